"""Adapters for training frameworks; each module needs the framework that it is called after."""
