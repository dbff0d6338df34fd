"""Breaks of the core that no test can notice, and why; `tests/mutants.py` holds them to that."""

SURVIVORS: dict[str, str] = {}
