"""Fixtures that several frameworks share."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> Iterator[None]:
    """Hide everything that exists already from the garbage collector.

    Accelerate collects garbage whenever a training starts, and most of that time goes into looking
    through what the imports have made.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def a_group() -> Iterator[None]:
    """Destroy the process group of one rank that a framework makes, and restore the environment."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
