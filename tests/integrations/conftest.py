"""Fixtures that several frameworks share."""

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture
def a_group() -> Iterator[None]:
    """Takes down what a framework sets up for one rank, in the environment too."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
