"""The promises as assertions, with messages that name modality and parameter."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._core.loss_function import check_loss
from modaldummy._core.reduce import sum_all
from modaldummy._core.term import connected_tensor
from modaldummy.testing._compare import count_zeros, difference, preserved


def assert_every_parameter_has_gradient(
    model: nn.Module, wrapper: DummyLossWrapper | None = None
) -> None:
    """Connect: after backward, every trainable parameter of ``model`` has a gradient.

    With a wrapper the message says which modality a parameter belongs to and why it may have been
    missed, and the gradients of the parameters that its last call took for inactive must be nowhere
    zero, as a scale above zero promises for one backward pass. The empty sparse gradient of a
    sparse embedding is what it ought to be.

    >>> import torch
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> wrapper.total(model["T1"](torch.ones(3, 4)).sum(), "T1").backward()
    >>> assert_every_parameter_has_gradient(model, wrapper)

    Args:
        model: The model that was trained one step, bare or wrapped.
        wrapper: The wrapper of its loss.

    Raises:
        AssertionError: A trainable parameter has no gradient, or a zero where there can be none;
            or the wrapper has not been called in gradient mode.
    """
    owners = {} if wrapper is None else _owners(wrapper)
    inactive = set() if wrapper is None else _inactive(wrapper)
    positive = wrapper is not None and bool(wrapper.scale)
    problems = []
    for name, parameter in model.named_parameters():
        label = f"{_label(owners.get(id(parameter)))}{name}"
        if parameter.grad is None:
            if parameter.requires_grad:
                cause = _cause(parameter, owners, inactive, wrapper)
                problems.append(f"{label}: no gradient{cause}")
        elif positive and id(parameter) in inactive and (zeros := count_zeros(parameter.grad)):
            problems.append(f"{label}: {zeros} of {parameter.numel()} elements are zero")
    _fail_if(problems, "trainable parameters lack a gradient after backward")


def assert_dummy_is_negligible(wrapper: DummyLossWrapper, max_fraction: float = 1e-4) -> None:
    """Bound: in the wrapper's last call, ``|dummy| <= max_fraction * |real|``.

    >>> import torch
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> total = wrapper.total(torch.tensor(2.0), "T1")
    >>> assert_dummy_is_negligible(wrapper)

    Args:
        wrapper: A wrapper whose ``total`` or wrapped loss has been called in gradient mode.
        max_fraction: Largest fraction of the real loss to accept, 0.01 % unless told otherwise.

    Raises:
        AssertionError: The dummy term is more than that, and the message names the parameters that
            contribute most; or the wrapper has not been called in gradient mode.
    """
    report = _last(wrapper)
    real, dummy = report.real.double().item(), report.dummy.double().item()
    if dummy == 0 or abs(dummy) <= max_fraction * abs(real):
        return
    raise AssertionError(
        f"The dummy term {dummy:.6g} is {report.fraction:.3%} of the real loss {real:.6g}, more "
        f"than {max_fraction:.3%}; inactive: {', '.join(report.inactive)}. Lower `scale` or "
        f"`max_fraction`. Largest sums:\n{_largest_sums(wrapper)}"
    )


def assert_gradients_unchanged(
    wrapper: DummyLossWrapper, loss_fn: Callable[[Any], Tensor], batch: Any
) -> None:
    """Bit for bit, the dummy changes no gradient but those of inactive parameters.

    Runs ``loss_fn(batch)`` and backward twice, from the same random state and with the same
    buffers: alone, and through ``wrapper.total``. Gradients, buffers and the random state of torch
    are put back afterwards; ``wrapper.last`` is not.

    >>> import torch
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> batch = {"T1": torch.ones(3, 4)}
    >>> assert_gradients_unchanged(wrapper, lambda batch: model["T1"](batch["T1"]).sum(), batch)

    Args:
        wrapper: The wrapper under test.
        loss_fn: Computes the real loss of a batch from the model. It must not be wrapped.
        batch: A batch for ``loss_fn``, which also says what is active.

    Raises:
        TypeError: ``loss_fn`` returns no real-valued tensor.
        AssertionError: A gradient differs, or ``loss_fn`` gives two results for one batch, as an
            operator without a deterministic implementation may.
    """
    model = wrapper.parameters.model
    with preserved(model):
        real = loss_fn(batch)
        check_loss(real, "`loss_fn(batch)`")
        first = real.detach().clone()
        alone = _gradients(model, real)
    with preserved(model):
        real = loss_fn(batch)
        if difference(first, real.detach()):
            raise AssertionError(
                f"`loss_fn` gave {first} and then {real.detach()} for the same batch, random state "
                "and buffers; make it deterministic, or no gradients can be compared."
            )
        with_dummy = _gradients(model, wrapper.total(real, batch))
    owners, inactive = _owners(wrapper), _inactive(wrapper)
    problems = [
        f"{_label(owners.get(id(parameter)))}{name}: {found}"
        for name, parameter in model.named_parameters()
        if id(parameter) not in inactive and (found := difference(alone[name], with_dummy[name]))
    ]
    _fail_if(problems, "gradients changed that the dummy term has no part in")


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    if loss.requires_grad:
        loss.mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _last(wrapper: DummyLossWrapper) -> StepReport:
    if wrapper.last is None:
        raise AssertionError(
            "The wrapper has not been called in gradient mode yet; call `wrapper.total` or the "
            "wrapped loss function first."
        )
    return wrapper.last


def _inactive(wrapper: DummyLossWrapper) -> set[int]:
    """Identities of the parameters that the last call took for inactive."""
    idle = wrapper.parameters.inactive_parameters(_last(wrapper).active)
    return {id(parameter) for _, parameter, _ in idle}


def _owners(wrapper: DummyLossWrapper) -> dict[int, list[str]]:
    """Keys of the map that own each parameter, by identity."""
    owners: dict[int, list[str]] = {}
    for key in wrapper.parameters.paths:
        for parameter in wrapper.named_parameters(key).values():
            owners.setdefault(id(parameter), []).append(
                key if isinstance(key, str) else "+".join(key)
            )
    return owners


def _label(keys: Iterable[str] | None) -> str:
    return f"[{', '.join(keys)}] " if keys else ""


def _cause(
    parameter: Tensor,
    owners: dict[int, list[str]],
    inactive: set[int],
    wrapper: DummyLossWrapper | None,
) -> str:
    if wrapper is None:
        return ""
    if id(parameter) not in owners:
        return "; it is in no modality of the map, and the loss does not reach it"
    if id(parameter) not in inactive:
        return "; it was active, but the loss does not reach it"
    if wrapper.scale is None:
        return "; it was inactive, and `scale=None` hands out none"
    return "; it was inactive: call backward on what the wrapper returned"


def _largest_sums(wrapper: DummyLossWrapper) -> str:
    """The up to five parameters that contribute most to the dummy term of the last call."""
    owners, report = _owners(wrapper), _last(wrapper)
    sums = {
        f"  {_label(owners[id(located[1])])}{located[0]}": sum_all(
            [connected_tensor(located)], dtype=report.dummy.dtype, device=report.dummy.device
        ).item()
        for located in wrapper.parameters.split(report.active).parameters
    }
    largest = sorted(sums, key=lambda label: -abs(sums[label]))[:5]
    return "\n".join(f"{label}: {sums[label]:.6g}" for label in largest)


def _fail_if(problems: list[str], what: str) -> None:
    if problems:
        raise AssertionError(f"{len(problems)} {what}:\n  " + "\n  ".join(problems))
