"""Hypothesis strategies and assertions that test the promises of modaldummy on your own model.

Needs the extra `testing`. The package registers nothing with pytest or Hypothesis: only tests that
import it load it.
"""

from modaldummy.testing.assertions import (
    assert_dummy_is_negligible,
    assert_every_parameter_has_gradient,
    assert_gradients_unchanged,
)
from modaldummy.testing.strategies import active_sets, batches, param_maps, scales

__all__ = [
    "active_sets",
    "assert_dummy_is_negligible",
    "assert_every_parameter_has_gradient",
    "assert_gradients_unchanged",
    "batches",
    "param_maps",
    "scales",
]
