"""The strategies of the kit draw what they say, all of it, and nothing else."""

from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import nn

from modaldummy import DummyLossWrapper, UnknownModalityError, active_modalities
from modaldummy._core.paths import strip_wrappers
from modaldummy.testing import active_sets, batches, param_maps, scales
from tests.zoo import Brain

NAMES = ("T1", "rsfMRI", "dMRI")
# Without shrinking, which takes most of the time.
QUICK = settings(max_examples=2000, derandomize=True, database=None, phases=[Phase.generate])


@given(st.data())
def test_a_batch_says_exactly_what_is_active(data: st.DataObject) -> None:
    active = data.draw(active_sets(NAMES))
    batch = data.draw(batches(NAMES, active))
    assert set(active_modalities(batch, NAMES)) == active


@given(data=st.data(), names=st.sampled_from([["modality", "modalities"], ["labels", "inputs"]]))
def test_modalities_may_have_the_names_of_other_keys(data: st.DataObject, names: list[str]) -> None:
    active = data.draw(active_sets(names))
    assert set(active_modalities(data.draw(batches(names, active)), names)) == active


@pytest.mark.parametrize("wanted", [set(), {"T1"}, {"T1", "dMRI"}, set(NAMES)])
def test_every_active_set_can_be_drawn(wanted: set[str]) -> None:
    assert find(active_sets(NAMES), lambda drawn: drawn == wanted, settings=QUICK) == wanted


@pytest.mark.parametrize("form", [list, dict, torch.Tensor])
def test_every_form_of_batch_can_be_drawn(form: type) -> None:
    """Also where no set is given."""
    batch = find(batches(NAMES), lambda b: isinstance(b, form), settings=QUICK)
    assert set(active_modalities(batch, NAMES)) <= set(NAMES)


@pytest.mark.parametrize("wanted", [lambda s: s == 1e-7, lambda s: s < 1e-30, lambda s: s > 100])
def test_scales_reach_all_magnitudes(wanted: Any) -> None:
    assert 1e-36 <= find(scales(), wanted, settings=QUICK) <= 1e3


@given(st.data())
def test_maps_fit_their_model(data: st.DataObject) -> None:
    """Each key owns something, wherever the model is wrapped."""
    model = Brain()
    wrapped: nn.Module = nn.Sequential()
    wrapped.add_module("module", model)
    spec = data.draw(param_maps(data.draw(st.sampled_from([model, wrapped]))))
    wrapper = DummyLossWrapper(wrapped, spec)
    known = {name for name, _ in model.named_parameters()}
    for key in spec:
        owned = {strip_wrappers(name) for name in wrapper.named_parameters(key)}
        assert owned
        assert owned <= known


KINDS = {
    "tuple key": lambda spec: any(isinstance(key, tuple) for key in spec),
    "glob": lambda spec: any(isinstance(value, str) and "*" in value for value in spec.values()),
    "module": lambda spec: any(isinstance(value, nn.Module) for value in spec.values()),
    "parameter": lambda spec: any(isinstance(value, nn.Parameter) for value in spec.values()),
    "nested": lambda spec: any(
        isinstance(value, list) and isinstance(value[0], list) for value in spec.values()
    ),
    "one of six": lambda spec: len(spec) == 6,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_map_can_be_drawn(kind: Any) -> None:
    assert kind(find(param_maps(Brain(), max_modalities=6), kind, settings=QUICK))


def test_names_with_wildcards_are_escaped() -> None:
    """A glob made from a name selects that name, whatever is in it."""
    model = nn.Module()
    model.add_module("a[0]", nn.Linear(1, 1))
    model.add_module("a0", nn.Linear(1, 1))
    drawn = param_maps(model, max_modalities=1)
    spec = find(drawn, lambda spec: ["a[[]0].*"] in spec.values(), settings=QUICK)
    (names,) = (DummyLossWrapper(model, spec).named_parameters(key) for key in spec)
    assert set(names) == {"a[0].weight", "a[0].bias"}


class OwnParameter(nn.Sequential):
    """Empty, and so false, yet it owns something."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(2))


@given(st.data())
def test_a_module_without_children_can_be_drawn(data: st.DataObject) -> None:
    model = nn.ModuleDict({"a": OwnParameter()})
    wrapper = DummyLossWrapper(model, data.draw(param_maps(model)))
    assert all(wrapper.named_parameters(key) for key in wrapper.modalities)


def test_bad_input_is_told() -> None:
    with pytest.raises(UnknownModalityError, match="`active` names the modality 't1'"):
        batches(NAMES, ["t1"])
    for empty in ((), "T1"):
        with pytest.raises(ValueError, match="`modalities` must be a non-empty sequence of names"):
            active_sets(empty)
    with pytest.raises(ValueError, match=r"`model` must have parameters to map, got a ReLU module"):
        param_maps(nn.ReLU())
