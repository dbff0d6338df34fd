"""Single values of a batch: which attributes an object has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modaldummy import BatchMetadataError, active_modalities
from modaldummy._core.batch_values import attribute
from modaldummy._core.loss_function import find_loss, is_data, may_contain_metadata

KNOWN = ("T1", "rsfMRI", "dMRI")
X = torch.zeros(2, 3)

# --- Attributes -------------------------------------------------------------------------------


class AttrDict(dict[str, Any]):
    """In hundreds of repositories; it raises KeyError for an attribute that it does not have."""

    __getattr__ = dict.__getitem__


class MakesItems(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self.setdefault(name, MakesItems())


class Raising:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class MakesAttributes(Raising):
    def __getattr__(self, name: str) -> Any:
        setattr(self, name, MakesAttributes())
        return getattr(self, name)


class AnswersAll(Raising):
    def __getattr__(self, name: str) -> Any:
        return {}


class AnswersAllByCalls(Raising):
    def __getattr__(self, name: str) -> Any:
        return lambda *args: name


class Delegating:
    """Its fields are in another object, and what that raises is its own affair."""

    def __init__(self, **fields: Any) -> None:
        self.inner = fields

    def __getattr__(self, name: str) -> Any:
        return vars(self)["inner"][name]


ITEMS: list[Callable[..., Any]] = [AttrDict, MakesItems]
ATTRIBUTES: list[Callable[..., Any]] = [
    Raising,
    MakesAttributes,
    AnswersAll,
    AnswersAllByCalls,
    Delegating,
]


def state(value: Any) -> tuple[str, list[str]]:
    return repr(dict(value) if isinstance(value, dict) else value), sorted(vars(value))


@pytest.mark.parametrize("make", ITEMS + ATTRIBUTES)
def test_looking_for_an_attribute_raises_and_creates_nothing(make: Callable[..., Any]) -> None:
    """In a batch, in samples, inside of a batch, in arguments and in results."""
    value = make(x=X)
    before = state(value)
    for batch in (value, [value], {"x": value}):
        with pytest.raises(BatchMetadataError, match="does not say"):
            active_modalities(batch, KNOWN)
        may_contain_metadata(batch, KNOWN)
    assert active_modalities({"T1": value}, KNOWN) == ("T1",)
    assert not is_data(value)
    with pytest.raises(TypeError, match="must return a tensor"):
        find_loss(value)
    assert state(value) == before


@pytest.mark.parametrize("make", ITEMS + ATTRIBUTES)
def test_real_fields_are_read(make: Callable[..., Any]) -> None:
    loss = torch.ones(())
    assert find_loss(make(loss=loss))[1] is loss
    assert active_modalities(make(modality="T1"), KNOWN) == ("T1",)
    if make in ITEMS:
        assert active_modalities([make(T1=X, dMRI=None)], KNOWN) == ("T1",)


def test_a_property_may_raise() -> None:
    class Lazy(Raising):
        @property
        def modality(self) -> str:
            raise ConnectionError("the disk is gone")

    with pytest.raises(ConnectionError, match="the disk is gone"):
        attribute(Lazy(), "modality")
