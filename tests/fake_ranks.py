"""Other ranks for a single process: what they send to the first rank is made up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from modaldummy import DummyLossWrapper, RankDisagreementError, check_ranks
from modaldummy._ranks.agreement import keys_in_order

# A batch that the other rank could not read.
UNREADABLE: Any = object()

Gather = Callable[[list[Tensor], Tensor], None]


def row_of(wrapper: DummyLossWrapper, batch: Any) -> Tensor:
    """The bytes that a rank sends: whether it could read its batch, and which keys are active."""
    active = [] if batch is UNREADABLE else wrapper.parameters.active_keys(batch)
    flags = [key in active for key in keys_in_order(wrapper.parameters.paths)]
    return torch.tensor([batch is not UNREADABLE, *flags], dtype=torch.uint8)


def pretend(patch: pytest.MonkeyPatch, num_ranks: int, all_gather: Callable[..., None]) -> None:
    """Let there be so many ranks, for which `all_gather` stands in."""
    patch.setattr(dist, "get_world_size", lambda group: num_ranks)
    patch.setattr(dist, "get_process_group_ranks", lambda group: range(num_ranks))
    patch.setattr(dist, "all_gather", all_gather)


def check(
    wrapper: DummyLossWrapper,
    *batches: Any,
    model: nn.Module | None = None,
    watch: Gather | None = None,
    backend: str = "cpu:gloo",
) -> None:
    """`check_ranks` on the first of several ranks, each of which has one of the `batches`.

    `watch` gets what was gathered, and what this rank sent.
    """

    def all_gather(received: list[Tensor], sent: Tensor, group: Any) -> None:
        received[0].copy_(sent)
        for row, batch in zip(received[1:], batches[1:], strict=True):
            row.copy_(row_of(wrapper, batch))
        if watch is not None:
            watch(received, sent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_backend_config", lambda group: backend)
        pretend(patch, len(batches), all_gather)
        patch.setattr("modaldummy._ranks.check.check_same_map", lambda *_: None)
        check_ranks(wrapper, batches[0], model=model)


def refusal(wrapper: DummyLossWrapper, *batches: Any, model: nn.Module | None = None) -> str:
    """The error of the first rank when it refuses the batches."""
    with pytest.raises(RankDisagreementError) as caught:
        check(wrapper, *batches, model=model)
    return str(caught.value)
