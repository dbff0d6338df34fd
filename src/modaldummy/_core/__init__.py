"""What runs when a loss is computed: from a batch to the total. Start with `wrapper.py`."""

from modaldummy._core.batch import active_modalities
from modaldummy._core.report import StepReport
from modaldummy._core.wrapper import DummyLossWrapper

__all__ = ["DummyLossWrapper", "StepReport", "active_modalities"]
