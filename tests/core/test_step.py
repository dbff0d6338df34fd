"""What the wrapper offers to code that extends it: steps, subscriptions, settings."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modaldummy import DummyLossWrapper, UnknownModalityError
from modaldummy._core.parameter_map import Step


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fusion = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.a.bias.requires_grad_(False)

    def wrapper(self, **options: Any) -> DummyLossWrapper:
        spec = {"a": "a", "b": ["b", "a.weight"], ("a", "b"): "fusion"}
        return DummyLossWrapper(self, spec, **options)


def names(step: Step) -> list[str]:
    return [owned.name for owned in step.inactive_parameters]


def test_a_step_says_what_is_active_and_which_parameters_are_not() -> None:
    """A tuple key needs all its modalities; frozen parameters and those of active keys are out."""
    wrapper = Towers().wrapper()
    step = wrapper.parameters.split({"a"})
    assert (step.active, step.inactive) == (("a",), ("b",))
    assert (step.active_keys, step.inactive_keys) == (("a",), ("b", ("a", "b")))
    assert names(step) == ["b.weight", "b.bias", "fusion.weight", "fusion.bias"]
    everything = wrapper.parameters.split({"a", "b"})
    assert (everything.inactive, everything.inactive_keys, names(everything)) == ((), (), [])
    nothing = wrapper.parameters.split(())
    assert (nothing.active, nothing.active_keys) == ((), ())
    assert names(nothing) == ["a.weight", "b.weight", "b.bias", "fusion.weight", "fusion.bias"]


def test_a_subscriber_gets_each_step_and_what_is_returned() -> None:
    model = Towers()
    wrapper = model.wrapper()
    seen: list[tuple[tuple[str, ...], Tensor]] = []
    unsubscribe = wrapper.subscribe(lambda step, total: seen.append((step.inactive, total)))
    loss = torch.ones((), requires_grad=True)
    criterion = wrapper(lambda batch: loss)
    totals = [wrapper.total(loss, ["a"]), wrapper.dummy(["b"]), criterion(batch={"a": loss[None]})]
    totals.append(wrapper.total(loss, ["a", "b"]))
    with torch.no_grad():
        wrapper.total(loss, ["a"])
    assert [inactive for inactive, _ in seen] == [("b",), ("a",), ("b",), ()]
    assert all(total is given for total, (_, given) in zip(totals, seen, strict=True))
    unsubscribe()
    wrapper.total(loss, ["a"])
    assert len(seen) == 4


def test_subscriptions_of_one_function_end_one_by_one() -> None:
    wrapper = Towers().wrapper()
    calls: list[str] = []

    def observe(step: Step, total: Tensor) -> None:
        calls.append("called")

    first, second = wrapper.subscribe(observe), wrapper.subscribe(observe)
    first()
    first()
    wrapper.total(torch.ones(()), ["a"])
    assert calls == ["called"]
    second()
    wrapper.total(torch.ones(()), ["a"])
    assert calls == ["called"]


def test_a_subscriber_may_end_its_subscription_while_it_is_called() -> None:
    wrapper = Towers().wrapper()
    calls: list[int] = []
    ends: list[Any] = []

    def observe(number: int, step: Step, total: Tensor) -> None:
        calls.append(number)
        ends[number]()

    ends += [wrapper.subscribe(partial(observe, number)) for number in range(3)]
    wrapper.total(torch.ones(()), ["a"])
    assert calls == [0, 1, 2]


def test_a_copy_has_no_subscribers() -> None:
    wrapper = Towers().wrapper()
    wrapper.subscribe(lambda step, total: pytest.fail("the copy called"))
    copy.deepcopy(wrapper).total(torch.ones(()), ["a"])


def test_a_share_is_a_factor_on_the_gradient() -> None:
    model = Towers()
    wrapper = model.wrapper(scale=1e-6)
    wrapper.add(torch.ones((), requires_grad=True), {"a"}, share=0.25).backward()
    assert model.b.bias.grad is not None
    assert model.b.bias.grad.tolist() == pytest.approx([2.5e-7] * 2)
    model.zero_grad()
    Towers.wrapper(model, scale=None).add(torch.ones((), requires_grad=True), {"a"}, 0.5).backward()
    assert model.b.bias.grad is None


@pytest.mark.parametrize("active", [["A"], "a b", {"a", "c"}])
def test_a_name_that_is_not_in_the_map_is_refused(active: Any) -> None:
    with pytest.raises(UnknownModalityError, match="`active` names the modality"):
        Towers().wrapper().add(torch.ones(()), active)


def test_settings_can_be_read_and_not_set() -> None:
    wrapper = Towers().wrapper(scale=1e-6, max_fraction=None, gradient_only=True)
    assert (wrapper.scale, wrapper.max_fraction, wrapper.reads_parameters) == (1e-6, None, False)
    assert Towers().wrapper(scale=0.0).reads_parameters is False
    for name in ("scale", "max_fraction", "reads_parameters"):
        with pytest.raises(AttributeError, match=name):
            setattr(wrapper, name, 1.0)
