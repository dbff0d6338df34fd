"""Adapters for training frameworks. Each module needs the framework of its name."""
