"""Random micro-batches between steps: the hold holds what its definition says, and only that."""

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import Optimizer

from modaldummy import hold_inactive
from tests.holding import assert_same_training, assert_untouched, snapshot
from tests.optimizers import OPTIMIZERS
from tests.zoo import Case, brain, is_active, tied_across

Window = list[set[str]]
MODALITIES: dict[Callable[[], Case], tuple[str, ...]] = {
    brain: ("T1", "rsfMRI", "dMRI"),
    tied_across: ("a", "b"),
}


@st.composite
def runs(draw: st.DrawFn) -> tuple[Callable[[], Case], list[tuple[Window, bool]]]:
    """How to make a case, and lists of micro-batches, each with whether a step ends it."""
    make = draw(st.sampled_from(list(MODALITIES)))
    window = st.lists(st.sets(st.sampled_from(MODALITIES[make])), min_size=1, max_size=3)
    ended = st.tuples(window, st.sampled_from([True, True, True, False]))
    return make, draw(st.lists(ended, min_size=1, max_size=5))


def untrained(case: Case, window: Window) -> set[str]:
    """Names of owned parameters none of whose keys was active in any micro-batch."""
    owners: dict[int, set[object]] = {}
    named = list(case.model.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        owners.setdefault(id(parameter), set()).update(case.owners.get(name, set()))
    return {
        name
        for name, parameter in named
        if (keys := owners[id(parameter)])
        and not any(is_active(key, active) for key in keys for active in window)  # type: ignore[arg-type]
    }


def made(make: Callable[[], Case], kind: str) -> tuple[Case, Optimizer]:
    torch.manual_seed(0)
    case = make()
    return case, OPTIMIZERS[kind](list(case.model.parameters()), 0.01)


@given(
    run=runs(),
    kind=st.sampled_from(list(OPTIMIZERS)),
    scale=st.sampled_from([1e-7, 0.0, None]),
    set_to_none=st.booleans(),
)
def test_training_is_that_of_an_optimizer_without_untrained_gradients(
    run: tuple[Callable[[], Case], list[tuple[Window, bool]]],
    kind: str,
    scale: float | None,
    set_to_none: bool,
) -> None:
    """Trained parameters get the same step. All others keep value, state and gradient."""
    make, windows = run
    (case, optimizer), (other, other_optimizer) = made(make, kind), made(make, kind)
    wrapper, other_wrapper = case.wrapper(scale), other.wrapper(scale)
    handle = hold_inactive(wrapper, optimizer)
    carried: Window = []
    for window, ended in windows:
        for active in window:
            wrapper.total(case.real(active), active).backward()
            other_wrapper.total(other.real(active), active).backward()
        if ended:
            still = untrained(other, window + carried)
            parameters = dict(case.model.named_parameters(remove_duplicate=False))
            held = {name: parameters[name] for name in still}
            before = snapshot(held.values(), optimizer)
            gradients = {name: p.grad for name, p in held.items()}
            optimizer.step()
            assert_untouched(held, optimizer, before)
            assert all(held[name].grad is gradient for name, gradient in gradients.items())
            owned = {p for group in optimizer.param_groups for p in group["params"]}
            assert {parameters[name] for name in handle.held} == owned & set(held.values())
            hidden = [p for n, p in other.model.named_parameters() if n in still]
            kept = [p.grad for p in hidden]
            for p in hidden:
                p.grad = None
            other_optimizer.step()
            for p, gradient in zip(hidden, kept, strict=True):
                p.grad = gradient
        # Nobody can tell zeros from gradients. Keys then count as trained until a step.
        carried = [] if ended or set_to_none else carried + window
        optimizer.zero_grad(set_to_none)
        other_optimizer.zero_grad(set_to_none)
    assert_same_training(case.model, optimizer, other.model, other_optimizer)
