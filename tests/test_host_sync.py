"""A step never waits for the device: nothing on its path reads a value into Python."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modaldummy import DummyLossWrapper
from tests.asserts import last_report
from tests.zoo import brain

# Operators that hand a value, or a shape that depends on values, back to the host.
SYNCS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
}


class CountSyncs(TorchDispatchMode):
    """Lists the operators of `SYNCS` that ran while it was on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.name().partition(".")[0] in SYNCS:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
@pytest.mark.parametrize("gradient_only", [False, True])
def test_no_host_sync_in_total_and_backward(scale: float | None, gradient_only: bool) -> None:
    wrapper = brain().wrapper(scale, gradient_only=gradient_only)
    loss_fn = wrapper(lambda batch: torch.ones((), requires_grad=True) * 2)
    with CountSyncs() as counter:
        for batch in ({"T1": torch.ones(2, 3), "dMRI": None}, ["rsfMRI"], [], ["T1", "dMRI"]):
            wrapper.total(torch.ones((), requires_grad=True) * 2, batch).backward()
            loss_fn({"modalities": batch}) if isinstance(batch, list) else loss_fn(batch)
    assert counter.seen == []


def test_a_step_on_meta_needs_no_value() -> None:
    """Tensors on `meta` have no values at all: whatever asked for one would raise."""
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("T1", "dMRI")}).to("meta")
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    total = wrapper.total(torch.ones((), device="meta", requires_grad=True) * 2, "T1")
    total.backward()
    assert all(p.grad is not None for p in model["dMRI"].parameters())


READS: dict[str, Any] = {"item": Tensor.item, "bool": bool, "float": float, "int": int}


@pytest.mark.parametrize("read", [*READS.values(), torch.nonzero], ids=[*READS, "nonzero"])
def test_the_counter_can_fail(read: Any) -> None:
    """It sees the usual ways to wait for a device, so an empty list means something."""
    with CountSyncs() as counter:
        read(torch.ones(()))
    assert counter.seen


@pytest.mark.parametrize("read", [*READS.values(), Tensor.tolist], ids=[*READS, "tolist"])
def test_meta_can_fail(read: Any) -> None:
    """And so does `meta`, also for what never passes the dispatcher on a CPU."""
    # Torch raises one or the other, by operator; both say that `meta` has no value to give.
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        read(torch.ones((), device="meta"))


def test_arguments_are_not_printed_on_the_way() -> None:
    """Printing a tensor waits for the device, and printing a model takes long."""
    printed: list[object] = []

    class Printable(nn.Module):
        def __repr__(self) -> str:
            printed.append(self)
            return "printed"

    wrapped = brain().wrapper()(lambda model, outputs, extra, batch: torch.ones(()) * 2)
    with patch.object(Tensor, "__repr__", Printable.__repr__):
        wrapped(Printable(), [torch.ones(2)], {"x": torch.ones(2)}, {"modality": "T1"})
    assert printed == []


def test_masks_of_a_mapping_are_read_at_once() -> None:
    """However many masks say which modalities are there, the host waits once."""
    masks = {name: torch.ones(2, dtype=torch.bool) for name in ("T1", "rsfMRI", "dMRI")}
    wrapper = brain().wrapper()
    with CountSyncs() as counter, patch.object(Tensor, "tolist", autospec=True) as tolist:
        tolist.return_value = [True, False, True]
        wrapper.total(torch.ones((), requires_grad=True) * 2, masks)
    assert counter.seen == []
    assert tolist.call_count == 1
    assert last_report(wrapper).active == ("T1", "dMRI")


def test_reading_the_report_waits_once() -> None:
    """Three numbers come over in one copy, and only when asked for."""
    wrapper = brain().wrapper()
    wrapper.total(torch.tensor(2.0), "T1")
    report = last_report(wrapper)
    with CountSyncs() as counter, patch.object(Tensor, "tolist", autospec=True) as tolist:
        tolist.return_value = [2.0, 0.0, 0.0]
        report.as_dict()
    assert counter.seen == []
    assert tolist.call_count == 1
