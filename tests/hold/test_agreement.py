"""How ranks agree on which keys are trained, tested in a single process."""

import pytest
import torch
import torch.distributed as dist

from modaldummy._hold import trained_keys

CPU = torch.device("cpu")


@pytest.mark.usefixtures("process_group")
def test_one_rank_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dist, "all_reduce")
    assert trained_keys._maximum_of_ranks([0, 2, 1], None, CPU) == [0, 2, 1]


@pytest.mark.usefixtures("process_group")
def test_the_largest_number_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on one rank beats untrained on another, and that beats a rank without a loss."""
    operators = []

    def with_another_rank(tensor: object, op: object, group: object) -> None:
        operators.append(op)
        tensor.clamp_(min=1)  # type: ignore[attr-defined]

    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", with_another_rank)
    assert trained_keys._maximum_of_ranks([0, 2, 1], None, CPU) == [1, 2, 1]
    assert operators == [dist.ReduceOp.MAX]
