"""Groups of ranks: which are taken, how large they are, and where their tensors go."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from modaldummy._group import check_group, num_ranks, tensor_device


@pytest.mark.usefixtures("process_group")
def test_a_group_or_none_is_taken() -> None:
    check_group(None)
    check_group(dist.group.WORLD)


@pytest.mark.parametrize(
    "group",
    [0, "world", object(), dist.GroupMember.NON_GROUP_MEMBER],
    ids=["a number", "a name", "an object", "none of this rank's"],
)
def test_anything_else_is_refused(group: Any) -> None:
    """Such as what `new_group` returns on a rank that is not in it."""
    with pytest.raises(TypeError, match=r"`group` must be .* that this rank belongs to, .* got "):
        check_group(group)


def test_without_torch_distributed_there_is_one_rank() -> None:
    assert num_ranks(None) == 1


@pytest.mark.usefixtures("process_group")
def test_a_group_has_as_many_ranks_as_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_ranks(None) == num_ranks(dist.group.WORLD) == 1
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3 if group is None else 2)
    assert num_ranks(None) == 3
    assert num_ranks(dist.group.WORLD) == 2
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert num_ranks(None) == 1


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
def test_tensors_live_where_the_backend_takes_them(
    monkeypatch: pytest.MonkeyPatch, config: str, parameters: str, expected: str
) -> None:
    """On the device of the parameters, which need not be the current one."""
    if config:
        monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert tensor_device(None, torch.device(parameters)) == torch.device(expected)
