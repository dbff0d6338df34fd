"""What the ranks tell each other, seen from a single one."""

import pytest
import torch
import torch.distributed as dist

from modaldummy import _window

CPU = torch.device("cpu")


@pytest.mark.usefixtures("process_group")
def test_one_rank_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dist, "all_reduce")
    assert _window._maximum([0, 2, 1], None, CPU) == [0, 2, 1]


@pytest.mark.usefixtures("process_group")
def test_the_largest_mark_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taught on one rank beats inactive on another, and that beats a rank that saw no loss."""
    operators = []

    def with_another_rank(tensor: object, op: object, group: object) -> None:
        operators.append(op)
        tensor.clamp_(min=1)  # type: ignore[attr-defined]

    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", with_another_rank)
    assert _window._maximum([0, 2, 1], None, CPU) == [1, 2, 1]
    assert operators == [dist.ReduceOp.MAX]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("config", "parameters", "expected"),
    [
        ("", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cpu"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cpu", "cuda"),
    ],
)
def test_marks_live_where_the_backend_takes_them(
    monkeypatch: pytest.MonkeyPatch, config: str, parameters: str, expected: str
) -> None:
    """On the device of the parameters, which need not be the current one."""
    if config:
        monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert _window._device(None, torch.device(parameters)) == torch.device(expected)
