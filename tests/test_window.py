"""What the ranks tell each other, seen from a single one."""

import pytest
import torch.distributed as dist

from modaldummy import _window


@pytest.mark.usefixtures("process_group")
def test_one_rank_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dist, "all_reduce")
    assert _window._maximum([0, 2, 1], None) == [0, 2, 1]


@pytest.mark.usefixtures("process_group")
def test_the_largest_mark_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taught on one rank beats inactive on another, and that beats a rank that saw no loss."""
    operators = []

    def with_another_rank(tensor: object, op: object, group: object) -> None:
        operators.append(op)
        tensor.clamp_(min=1)  # type: ignore[attr-defined]

    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", with_another_rank)
    assert _window._maximum([0, 2, 1], None) == [1, 2, 1]
    assert operators == [dist.ReduceOp.MAX]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("config", "device"),
    [
        ("cuda:nccl", "cuda"),
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("xpu:ccl,cpu:gloo", "cpu"),
        ("", "cpu"),
    ],
)
def test_marks_live_where_the_backend_takes_them(
    monkeypatch: pytest.MonkeyPatch, config: str, device: str
) -> None:
    if config:
        monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert _window._device(None) == device
