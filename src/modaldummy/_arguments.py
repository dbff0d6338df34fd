"""Checks of arguments that several public functions take."""

from torch import nn

from modaldummy._errors import describe
from modaldummy._wrapper import DummyLossWrapper


def check_wrapper(wrapper: object) -> None:
    """Refuse what is no wrapper.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(wrapper, DummyLossWrapper):
        raise TypeError(f"`wrapper` must be a DummyLossWrapper, got {describe(wrapper)}.")


def check_model(model: object) -> None:
    """Refuse what is neither a module nor None.

    Raises:
        TypeError: It is something else.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module or None, got {describe(model)}.")


def called_model(wrapper: DummyLossWrapper, model: nn.Module | None) -> nn.Module:
    """What is called in training: `model`, or that of the wrapper if it is None.

    Raises:
        ValueError: `model` shares no parameter with the model of the wrapper.
    """
    own = wrapper._map.model
    if model is None or model is own:
        return own
    if {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in own.parameters()):
        raise ValueError(
            f"`model` ({type(model).__name__}) shares no parameter with the model of the wrapper "
            f"({type(own).__name__}); pass the one that was wrapped, sharded or compiled from it, "
            "or make the wrapper with the model that is trained."
        )
    return model
