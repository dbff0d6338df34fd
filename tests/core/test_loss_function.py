"""Which argument of a call holds the metadata: every way to call a wrapped loss function."""

import functools
import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modaldummy import BatchMetadataError, DummyLossWrapper, UnknownModalityError
from modaldummy._core.loss_function import may_contain_metadata
from tests.asserts import gradients_of
from tests.zoo import brain

KNOWN = ("T1", "rsfMRI", "dMRI")
X = torch.zeros(2, 3)
T1_BATCH = {"T1": torch.ones(2, 3), "dMRI": None}
REAL = torch.tensor(2.0)
NUM_INACTIVE = 6  # weight and bias of rsfMRI, dMRI and of the fusion that dMRI is missing for


def real_loss() -> Tensor:
    return torch.tensor(2.0, requires_grad=True) * 1


def plain(output: Tensor, batch: dict[str, Any]) -> Tensor:
    return output * 1


def keyword_only(output: Tensor, *, batch: dict[str, Any]) -> Tensor:
    return output * 1


def splatted(output: Tensor, **batch: Any) -> Tensor:
    assert "modalities" not in batch
    return output * 1


def variadic(*things: Any) -> Tensor:
    loss: Tensor = things[0]
    return loss * 1


def named_cls(output: Tensor, cls: Any) -> Tensor:
    return output * 1


def named_modality(output: Tensor, modality: Any) -> Tensor:
    return output * 1


def named_modalities(output: Tensor, modalities: Any = None) -> Tensor:
    assert modalities == ["T1"]
    return output * 1


class Criterion(nn.Module):
    def forward(self, output: Tensor, batch: dict[str, Any]) -> Tensor:
        return output * 1


def reducing(output: Tensor, reduction: Any, batch: Any) -> Tensor:
    return output * 1


@dataclass
class Reduction:
    """A function with settings, which are of no batch."""

    modality: str

    def __call__(self, output: Tensor) -> Tensor:
        return output.mean()


class Callable(dict[str, Any]):
    """As PyTorch Geometric's `Data` can be."""

    def __call__(self) -> None:
        """Give keys and values, there."""


def calls(wrapper: DummyLossWrapper, out: Tensor) -> dict[str, Tensor]:
    """One call for each way in which a loss function can meet its metadata; all mean T1."""
    captions, labels = ["a scan", "another"], [0, 1, 2]
    decoy = {"logits": out}
    return {
        "second argument": wrapper(plain)(out, T1_BATCH),
        "keyword argument": wrapper(plain)(output=out, batch=T1_BATCH),
        "keyword-only": wrapper(keyword_only)(out, batch=T1_BATCH),
        "after empty annotations": wrapper(variadic)(out, [[], []], T1_BATCH),
        "after lists of masks": wrapper(variadic)(
            out, [torch.ones(3) > 0, torch.ones(5) > 0], T1_BATCH
        ),
        "second argument called cls": wrapper(named_cls)(out, T1_BATCH),
        "splatted batch": wrapper(splatted)(out, **T1_BATCH),
        "splatted batch with explicit key": wrapper(splatted)(out, x=1, modality="T1"),
        "batch among keywords": wrapper(splatted)(out, inputs=[{"modality": "T1"}]),
        "after other arguments": wrapper(variadic)(
            out, None, captions, labels, decoy, "T1", T1_BATCH
        ),
        "first that can be read": wrapper(variadic)(out, T1_BATCH, {"modality": "dMRI"}),
        "keyword modalities": wrapper(plain)(out, {"dMRI": 1}, modalities=["T1"]),
        "keyword modalities as mask": wrapper(plain)(out, {}, modalities=[True, False, False]),
        "keyword of a function with **kwargs": wrapper(splatted)(out, modalities="T1"),
        "keyword None is not given": wrapper(plain)(out, T1_BATCH, modalities=None),
        "parameter modality": wrapper(named_modality)(out, "T1"),
        "parameter modality as index": wrapper(named_modality)(out, torch.tensor([0, 0])),
        "parameter modalities": wrapper(named_modalities)(out, ["T1"]),
        "parameter modalities by keyword": wrapper(named_modalities)(out, modalities=["T1"]),
        "module": wrapper(Criterion())(out, T1_BATCH),
        "keyword of a partial": wrapper(functools.partial(plain, batch=T1_BATCH))(out),
        "argument of a partial": wrapper(functools.partial(variadic, out, T1_BATCH))(),
        "partial of a partial": wrapper(
            functools.partial(functools.partial(variadic, out), T1_BATCH)
        )({"modality": "dMRI"}),
        "metadata in a partial": wrapper(functools.partial(named_modality, modality="T1"))(out),
        "keyword over a partial": wrapper(functools.partial(named_modality, modality="dMRI"))(
            out, modality="T1"
        ),
        "batch that can be called": wrapper(plain)(out, Callable(modality=["T1"])),
        "callable with a field of that name": wrapper(reducing)(out, Reduction("dMRI"), T1_BATCH),
        "builtin without signature": wrapper(torch.dist)(out, out.detach(), modalities="T1"),
    }


@pytest.mark.parametrize("name", calls(brain().wrapper(), REAL))
def test_every_way_to_call_a_wrapped_loss(name: str) -> None:
    case = brain()
    wrapper = case.wrapper()
    out = real_loss()
    total = calls(wrapper, out)[name]
    total.backward()
    assert len(gradients_of(case.inactive({"T1"}))) == NUM_INACTIVE


class Trainer:
    """Looks like a batch: it has attributes `modality` and `modalities`."""

    modality = "dMRI"
    modalities = ("dMRI", "rsfMRI")

    def __init__(self, wrapper: DummyLossWrapper) -> None:
        self.bound = wrapper(self.compute_loss)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], scale: float = 1.0) -> Tensor:
        return torch.tensor(2.0, requires_grad=True) * scale


def test_a_method_is_not_asked_about_self() -> None:
    """Neither as a decorated function of the class nor bound; nor is the model asked."""
    case = brain()
    wrapper = case.wrapper()
    trainer = Trainer(wrapper)
    decorated = wrapper(Trainer.compute_loss)
    for call in (functools.partial(decorated, trainer), trainer.bound):
        call(case.model, T1_BATCH)
        assert wrapper.last is not None
        assert wrapper.last.active == ("T1",)


def test_a_wrapped_function_looks_like_the_original() -> None:
    wrapped = brain().wrapper()(plain)
    assert wrapped.__name__ == "plain"
    assert inspect.signature(wrapped) == inspect.signature(plain)
    assert "_modules" not in vars(brain().wrapper()(Criterion()))


def test_the_batch_is_read_before_the_loss_function_runs() -> None:
    """HF models pop entries from the batch while they compute the loss."""
    wrapper = brain().wrapper()

    @wrapper
    def loss(batch: dict[str, Any]) -> Tensor:
        batch.clear()
        return real_loss()

    loss(dict(T1_BATCH))
    assert wrapper.last is not None
    assert wrapper.last.active == ("T1",)


def test_metadata_in_an_object() -> None:
    wrapper = brain().wrapper()
    wrapper(variadic)(REAL, SimpleNamespace(modalities=["rsfMRI"], x=REAL))
    assert wrapper.last is not None
    assert wrapper.last.active == ("rsfMRI",)


def test_an_unknown_name_under_an_explicit_key_raises_at_once() -> None:
    """Even if a later argument could be read."""
    wrapper = brain().wrapper()
    with pytest.raises(UnknownModalityError, match=r"'t1'.*did you mean 'T1'"):
        wrapper(variadic)(REAL, {"modality": "t1"}, T1_BATCH)


class Weighted(nn.Module):
    """A loss function that names the modalities itself."""

    def forward(self, prediction: Tensor, modalities: list[str]) -> Tensor:
        return prediction.mean() * len(modalities)


def test_a_module_is_called_like_its_forward() -> None:
    """It gets `modalities` if `forward` has that parameter, by keyword or by position."""
    model = nn.ModuleDict({name: nn.Linear(1, 1) for name in ("T1", "dMRI")})
    wrapper = DummyLossWrapper(model, {name: name for name in model}, gradient_only=True)
    criterion = wrapper(Weighted())
    for total in (criterion(X, modalities=["T1"]), criterion(X, ["T1"])):
        assert total.item() == X.mean()
        assert wrapper.last is not None
        assert wrapper.last.active == ("T1",)


class OwnCall(nn.Module):
    """A module that is not called through `forward`."""

    def __call__(self, prediction: Tensor, batch: Any = None) -> Tensor:
        return prediction.mean()


def test_a_module_with_a_call_of_its_own_is_called_by_that() -> None:
    model = nn.ModuleDict({name: nn.Linear(1, 1) for name in ("T1", "dMRI")})
    wrapper = DummyLossWrapper(model, {name: name for name in model}, gradient_only=True)
    assert wrapper(OwnCall())(X, batch={"T1": X}).item() == X.mean()


def test_resolver_replaces_the_default_reader() -> None:
    """It is asked about each argument that could be a batch, until it can read one."""
    asked = []

    def resolver(batch: Any) -> Any:
        asked.append(batch)
        return (name for name in batch["scans"])

    wrapper = brain().wrapper(resolver=resolver)
    decoy, batch = {"T1": 1}, {"scans": ["T1"]}
    wrapper(variadic)(REAL, decoy, batch)
    assert asked == [decoy, batch]
    assert wrapper.last is not None
    assert wrapper.last.active == ("T1",)
    wrapper.total(REAL, batch)
    assert wrapper.last.active == ("T1",)


def test_resolver_may_return_a_bare_name() -> None:
    wrapper = brain().wrapper(resolver=lambda batch: batch)
    wrapper.total(REAL, "rsfMRI")
    assert wrapper.last is not None
    assert wrapper.last.active == ("rsfMRI",)


@pytest.mark.parametrize(
    "answer",
    [{"T1": True, "dMRI": False}, torch.tensor([True, False, False]), [["T1"], ["T1"]], ("T1",)],
    ids=["flags", "mask", "per sample", "tuple"],
)
def test_resolver_may_return_any_form(answer: Any) -> None:
    wrapper = brain().wrapper(resolver=lambda batch: answer)
    wrapper.total(REAL, {})
    assert wrapper.last is not None
    assert wrapper.last.active == ("T1",)


def test_a_resolver_that_finds_nothing_in_any_argument_is_told() -> None:
    wrapper = brain().wrapper(resolver=lambda batch: None)
    with pytest.raises(BatchMetadataError, match=r"`resolver` returned None"):
        wrapper(plain)(REAL, T1_BATCH)


def test_a_function_without_a_signature_is_read_by_position() -> None:
    """Some builtins have none that `inspect` could find."""
    wrapper = brain().wrapper()
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(max)
    losses = [torch.tensor(2.0), torch.tensor(1.0)]
    wrapper(max)(*losses, modalities=["T1"])
    assert wrapper.last is not None
    assert wrapper.last.active == ("T1",)
    with pytest.raises(BatchMetadataError, match="argument 1: a Tensor of shape"):
        wrapper(max)(*losses)


def test_the_keyword_beats_the_resolver() -> None:
    wrapper = brain().wrapper(resolver=lambda batch: ["dMRI"])
    wrapper(plain)(REAL, T1_BATCH, modalities=["T1"])
    assert wrapper.last is not None
    assert wrapper.last.active == ("T1",)


@pytest.mark.parametrize(
    "kind", [KeyError, IndexError, TypeError, AttributeError, BatchMetadataError]
)
def test_a_resolver_may_fail_on_what_is_no_batch(kind: type[Exception]) -> None:
    """Written for one kind of batch, it raises when asked about another argument."""

    def resolver(batch: Any) -> Any:
        if "scans" not in batch:
            raise kind("no scans")
        return batch["scans"]

    wrapper = brain().wrapper(resolver=resolver)
    wrapper(variadic)(REAL, {"logits": REAL}, {"scans": ["T1"]})
    assert wrapper.last is not None
    assert wrapper.last.active == ("T1",)


def test_a_resolver_may_read_what_the_default_reader_would_skip() -> None:
    """A list of file names says nothing to us, but it may to the user."""
    wrapper = brain().wrapper(resolver=lambda files: [file.split("_")[1] for file in files])
    wrapper(variadic)(REAL, ["sub-01_T1", "sub-02_dMRI"])
    assert wrapper.last is not None
    assert wrapper.last.active == ("T1", "dMRI")


def test_a_bug_in_a_resolver_is_not_swallowed() -> None:
    """In `total` as it is; in a call, where other arguments are tried, in the message."""

    def resolver(batch: Any) -> Any:
        raise KeyError("scans")

    wrapper = brain().wrapper(resolver=resolver)
    with pytest.raises(KeyError, match="scans"):
        wrapper.total(REAL, T1_BATCH)
    with pytest.raises(BatchMetadataError, match="raised KeyError: 'scans'"):
        wrapper(plain)(REAL, T1_BATCH)


@pytest.mark.parametrize(
    "argument",
    [
        *(
            X,
            np.zeros(2),
            1,
            2.0,
            "mean",
            b"T1",
            None,
            True,
            [],
            [[], []],
            (),
            torch.nn.Linear(1, 1),
            len,
        ),
        *(["a photo of T1"], [["sub-01.nii"], ["sub-02.nii"]], [X], [X > 0], [[0, 1]], [[None]]),
    ],
    ids=repr,
)
def test_arguments_that_are_never_asked(argument: Any) -> None:
    assert not may_contain_metadata(argument, KNOWN)


@pytest.mark.parametrize(
    "argument",
    [{"x": X}, ["T1"], ["T1", "x"], [[], ["T1"]], [{"x": X}], SimpleNamespace(x=X)],
    ids=repr,
)
def test_arguments_that_are_asked(argument: Any) -> None:
    assert may_contain_metadata(argument, KNOWN)
