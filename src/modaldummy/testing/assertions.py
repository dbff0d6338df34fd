"""Assertions that state each promise of the library; messages name modality and parameter."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._core.loss_function import check_loss
from modaldummy._core.parameter_map import text_of
from modaldummy._core.term import term_input
from modaldummy._ownership import owners_of
from modaldummy.testing.compare import count_zeros, describe_difference, preserve_state

_MAX_LISTED_SUMS = 5


def assert_every_parameter_has_gradient(
    model: nn.Module, wrapper: DummyLossWrapper | None = None
) -> None:
    """Connect: after backward, every trainable parameter of ``model`` has a gradient.

    With a wrapper, the message names the modality of each parameter and a likely cause. The
    gradients of parameters that were inactive in the wrapper's last call must then be nowhere zero
    if the scale is above 0. The dummy gradient of a sparse embedding is empty, and passes.

    >>> import torch
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> wrapper.total(model["T1"](torch.ones(3, 4)).sum(), "T1").backward()
    >>> assert_every_parameter_has_gradient(model, wrapper)

    Args:
        model: The model, bare or wrapped, after one backward pass from cleared gradients.
        wrapper: The wrapper of its loss.

    Raises:
        AssertionError: A trainable parameter has no gradient, an inactive one has a zero in its
            gradient, or the wrapper has not been called in gradient mode.
    """
    owners = {} if wrapper is None else _owners(wrapper)
    inactive = set() if wrapper is None else _inactive_ids(wrapper)
    must_be_nonzero = inactive if wrapper is not None and wrapper.scale else set()
    problems = []
    for name, parameter in model.named_parameters():
        label, key = _label(name, parameter, owners), id(parameter)
        if parameter.grad is not None:
            if key in must_be_nonzero and (num_zeros := count_zeros(parameter.grad)):
                problems.append(f"{label}: {num_zeros} of {parameter.numel()} elements are zero")
        elif parameter.requires_grad:
            cause = "" if wrapper is None else _cause(wrapper, key in owners, key in inactive)
            problems.append(f"{label}: no gradient{cause}")
    _fail_if(problems, "trainable parameters have no usable gradient after backward")


def assert_dummy_is_negligible(wrapper: DummyLossWrapper, max_fraction: float = 1e-4) -> None:
    """Bound: in the wrapper's last call, ``|dummy| <= max_fraction * |real|``.

    >>> import torch
    >>> model = nn.ModuleDict({"T1": nn.Linear(4, 2), "dMRI": nn.Linear(6, 2)})
    >>> wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    >>> total = wrapper.total(torch.tensor(2.0), "T1")
    >>> assert_dummy_is_negligible(wrapper)

    Args:
        wrapper: A wrapper whose ``total`` or wrapped loss has been called in gradient mode.
        max_fraction: Largest fraction of the real loss to accept; 0.01 % by default.

    Raises:
        AssertionError: The dummy term is larger, or the wrapper has not been called in gradient
            mode. The message names the parameters that contribute most.
    """
    report = _last_report(wrapper)
    real, dummy = report.real.double().item(), report.dummy.double().item()
    if dummy == 0 or abs(dummy) <= max_fraction * abs(real):
        return
    raise AssertionError(
        f"The dummy term must be at most {max_fraction:.3%} of the real loss {real:.6g}, got "
        f"{dummy:.6g}, which is {report.fraction:.3%}. Inactive: {', '.join(report.inactive)}. "
        f"Lower `scale` or `max_fraction`. Largest sums:\n{_largest_sums(wrapper, report)}"
    )


def assert_gradients_unchanged(
    wrapper: DummyLossWrapper, loss_fn: Callable[[Any], Tensor], batch: Any
) -> None:
    """The dummy term changes no gradient bit, except in parameters of inactive modalities.

    Runs ``loss_fn(batch)`` and backward twice, from the same random state and with the same
    buffers: alone, and through ``wrapper.total``. Afterwards it restores gradients, buffers and the
    random state of torch, but not ``wrapper.last``.

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
        TypeError: ``loss_fn`` does not return a real-valued tensor.
        AssertionError: A gradient differs, or ``loss_fn`` gives two results for one batch, as an
            operator without a deterministic implementation may.
    """
    model = wrapper.parameters.model

    def run(total_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The real loss, and the gradients of its total."""
        with preserve_state(model):
            loss = loss_fn(batch)
            check_loss(loss, "`loss_fn(batch)`")
            real, total = loss.detach().clone(), total_of(loss)
            if total.requires_grad:
                total.mean().backward()
            return real, {name: parameter.grad for name, parameter in model.named_parameters()}

    first_loss, without_dummy = run(lambda loss: loss)
    second_loss, with_dummy = run(lambda loss: wrapper.total(loss, batch))
    if describe_difference(first_loss, second_loss):
        raise AssertionError(
            "`loss_fn` must return the same loss for the same batch, random state and buffers, "
            f"got {first_loss} and then {second_loss}. Make it deterministic."
        )
    owners, inactive = _owners(wrapper), _inactive_ids(wrapper)
    problems = [
        f"{_label(name, parameter, owners)}: {difference}"
        for name, parameter in model.named_parameters()
        if id(parameter) not in inactive
        and (difference := describe_difference(without_dummy[name], with_dummy[name]))
    ]
    _fail_if(problems, "gradients changed that the dummy term must not change")


def _last_report(wrapper: DummyLossWrapper) -> StepReport:
    if wrapper.last is None:
        raise AssertionError(
            "The wrapper has not been called in gradient mode yet. Call `wrapper.total` or the "
            "wrapped loss function first."
        )
    return wrapper.last


def _inactive_ids(wrapper: DummyLossWrapper) -> set[int]:
    """`id` of each parameter that the last call gave a dummy gradient."""
    step = wrapper.parameters.split(_last_report(wrapper).active)
    return {id(owned.parameter) for owned in step.inactive_parameters}


def _owners(wrapper: DummyLossWrapper) -> dict[int, list[str]]:
    """`id` of each parameter of the map to the keys that own it."""
    return {i: list(map(text_of, keys)) for i, keys in owners_of(wrapper.parameters).items()}


def _label(name: str, parameter: Tensor, owners: dict[int, list[str]]) -> str:
    """`name` after its owners: `[T1, dMRI] fusion.weight`."""
    keys = owners.get(id(parameter))
    return f"[{', '.join(keys)}] {name}" if keys else name


def _cause(wrapper: DummyLossWrapper, is_owned: bool, is_inactive: bool) -> str:
    """The likely cause of a gradient that is missing."""
    if not is_owned:
        return ". No modality owns it, and the loss does not depend on it."
    if not is_inactive:
        return ". Its modality was active, but the loss does not depend on it."
    if wrapper.scale is None:
        return ". Its modality was inactive, and `scale=None` gives no gradient."
    return ". Its modality was inactive. Call `backward()` on what the wrapper returned."


def _largest_sums(wrapper: DummyLossWrapper, report: StepReport) -> str:
    """The inactive parameters that contribute most to the dummy term, one in each line."""
    owners = _owners(wrapper)
    like = report.dummy.detach()
    sums = {
        _label(owned.name, owned.parameter, owners): term_input(owned).to(like).sum().item()
        for owned in wrapper.parameters.split(report.active).inactive_parameters
    }
    largest = sorted(sums, key=lambda label: -abs(sums[label]))[:_MAX_LISTED_SUMS]
    return "\n".join(f"  {label}: {sums[label]:.6g}" for label in largest)


def _fail_if(problems: list[str], what: str) -> None:
    if problems:
        raise AssertionError(f"{len(problems)} {what}:\n  " + "\n  ".join(problems))
