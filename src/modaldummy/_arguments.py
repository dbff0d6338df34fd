"""Checks of arguments that several public functions take."""

from torch import nn

from modaldummy._core import DummyLossWrapper
from modaldummy._core.loss_function import WrappedLoss
from modaldummy._errors import describe


def check_wrapper(wrapper: object, second: object = None) -> None:
    """Refuse an argument that is not a wrapper.

    Args:
        wrapper: The first argument of a call.
        second: The second one, which users may swap with it.

    Raises:
        TypeError: It has another type.
    """
    if not isinstance(wrapper, DummyLossWrapper):
        swap = " Swap the first two arguments." if isinstance(second, DummyLossWrapper) else ""
        raise TypeError(f"`wrapper` must be a DummyLossWrapper, got {describe(wrapper)}.{swap}")


def check_model(model: object) -> None:
    """Refuse an argument that is neither a module nor None.

    Raises:
        TypeError: It has another type.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module or None, got {describe(model)}.")


def wrappers_in(model: nn.Module) -> list[DummyLossWrapper]:
    """Wrappers that the model or a module in it has as an attribute, each once.

    A loss function that a wrapper has wrapped counts as that wrapper.
    """
    values = [value for module in model.modules() for value in vars(module).values()]
    values = [value.wrapper if isinstance(value, WrappedLoss) else value for value in values]
    return list(dict.fromkeys(v for v in values if isinstance(v, DummyLossWrapper)))


def called_model(wrapper: DummyLossWrapper, model: nn.Module | None) -> nn.Module:
    """The module that training calls: `model`, or that of the wrapper if it is None.

    Raises:
        ValueError: `model` shares no parameter with the model of the wrapper.
    """
    wrapped = wrapper.parameters.model
    if model is None or model is wrapped:
        return wrapped
    if {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in wrapped.parameters()):
        raise ValueError(
            f"`model` ({type(model).__name__}) shares no parameter with the model of the wrapper "
            f"({type(wrapped).__name__}). Pass the module that was wrapped, sharded or compiled "
            "from it, or make the wrapper with the model that is trained."
        )
    return model
