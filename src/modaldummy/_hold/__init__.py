"""Keeps still what no batch has taught."""
