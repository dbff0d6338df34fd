"""Hypothesis strategies and assertions, to test the promises on a model of your own.

Needs the extra `testing`. Nothing is registered with pytest or Hypothesis: a test that wants
these imports them.
"""

from modaldummy.testing._assertions import (
    assert_dummy_is_negligible,
    assert_every_parameter_has_gradient,
    assert_gradients_unchanged,
)
from modaldummy.testing._strategies import active_sets, batches, param_maps, scales

__all__ = [
    "active_sets",
    "assert_dummy_is_negligible",
    "assert_every_parameter_has_gradient",
    "assert_gradients_unchanged",
    "batches",
    "param_maps",
    "scales",
]
