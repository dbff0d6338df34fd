"""How the tests of batches read one, in every way that a user has."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modaldummy import DummyLossWrapper, active_modalities

NAMES = ("T1", "rsfMRI", "dMRI")
PAGE = Path(__file__).parents[2] / "docs/how-to/batches.md"
X = torch.ones(4, 3)
Resolver = Callable[[Any], Any]


def active(batch: Any, *, names: tuple[str, ...] = NAMES, resolver: Resolver | None = None) -> Any:
    """What `total`, a wrapped loss and `active_modalities` read from a batch, which is one."""
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    wrapper = DummyLossWrapper(model, {name: name for name in names}, resolver=resolver)
    wrapper.total(torch.tensor(2.0), batch)
    assert wrapper.last is not None
    found = wrapper.last.active
    wrapper(lambda model, inputs: torch.tensor(2.0))(model, batch)
    assert wrapper.last.active == found
    assert resolver or active_modalities(batch, names) == found
    return found


def resolver_for(library: str) -> Resolver:
    """The resolver that the page shows."""
    row = re.search(rf"^\| {library}.*`(lambda [^`]+)` \|$", PAGE.read_text(), re.M)
    assert row is not None
    resolver: Resolver = eval(row.group(1))
    return resolver
