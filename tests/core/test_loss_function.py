"""A wrapped loss function: which argument says what is active, and where the loss is."""

import copy
import functools
import inspect
import io
import pickle
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from modaldummy import BatchMetadataError, DummyLossWrapper, UnknownModalityError
from modaldummy._arguments import wrappers_in
from modaldummy._core.loss_function import find_loss, may_contain_metadata, replace_loss, with_item
from tests.asserts import last_report
from tests.zoo import brain

KNOWN = ("T1", "rsfMRI", "dMRI")
X = torch.zeros(2, 3)
T1_BATCH = {"T1": torch.ones(2, 3), "dMRI": None}
OUT = torch.tensor(2.0)


# --- The argument that says which modalities are active ---------------------------------------


def plain(output: Tensor, batch: Any = None) -> Tensor:
    return output * 1


plain.note = "an attribute of a function"  # type: ignore[attr-defined]


def keyword_only(output: Tensor, *, batch: dict[str, Any]) -> Tensor:
    return output * 1


def splatted(output: Tensor, **batch: Any) -> Tensor:
    assert "modalities" not in batch
    return output * 1


def variadic(*things: Any) -> Tensor:
    loss: Tensor = things[0]
    return loss * 1


def batch_first(batch: Any, *others: int) -> Tensor:
    return OUT * 1


def of_a_class(cls: Any, batch: Any) -> Tensor:
    return OUT * 1


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


class Weighted(nn.Module):
    """It names the modalities itself, so it gets them."""

    def forward(self, output: Tensor, modalities: list[str]) -> Tensor:
        return output * len(modalities)


class OwnCall(nn.Module):
    """A module that is not called through `forward`."""

    def __call__(self, output: Tensor, batch: Any = None) -> Tensor:
        return output * 1


def reducing(output: Tensor, reduction: Any, batch: Any) -> Tensor:
    return output * 1


@dataclass
class Reduction:
    """A function whose settings belong to no batch."""

    modality: str

    def __call__(self, output: Tensor) -> Tensor:
        return output.mean()


class CallableBatch(dict[str, Any]):
    """As PyTorch Geometric's `Data` can be."""

    def __call__(self) -> None:
        """Give keys and values, there."""


partial = functools.partial
MASKS = [torch.ones(3) > 0, torch.ones(5) > 0]
# A loss function and a call of it; all calls mean T1.
CALLS: dict[str, tuple[Callable[..., Tensor], Callable[[Any], Tensor]]] = {
    "second argument": (plain, lambda f: f(OUT, T1_BATCH)),
    "keyword argument": (plain, lambda f: f(output=OUT, batch=T1_BATCH)),
    "keyword-only": (keyword_only, lambda f: f(OUT, batch=T1_BATCH)),
    "object": (plain, lambda f: f(OUT, SimpleNamespace(modalities=["T1"], x=OUT))),
    "after empty annotations": (variadic, lambda f: f(OUT, [[], []], T1_BATCH)),
    "after lists of masks": (variadic, lambda f: f(OUT, MASKS, T1_BATCH)),
    "second argument called cls": (named_cls, lambda f: f(OUT, T1_BATCH)),
    "splatted batch": (splatted, lambda f: f(OUT, **T1_BATCH)),
    "splatted batch with explicit key": (splatted, lambda f: f(OUT, x=1, modality="T1")),
    "batch among keywords": (splatted, lambda f: f(OUT, inputs=[{"modality": "T1"}])),
    "after other arguments": (
        variadic,
        lambda f: f(OUT, None, ["a scan", "another"], [0, 1], {"logits": OUT}, "T1", T1_BATCH),
    ),
    "first that can be read": (variadic, lambda f: f(OUT, T1_BATCH, {"modality": "dMRI"})),
    "keyword modalities": (plain, lambda f: f(OUT, {"dMRI": 1}, modalities=["T1"])),
    "keyword modalities as mask": (plain, lambda f: f(OUT, {}, modalities=[True, False, False])),
    "keyword of a function with **kwargs": (splatted, lambda f: f(OUT, modalities="T1")),
    "keyword None is not given": (plain, lambda f: f(OUT, T1_BATCH, modalities=None)),
    "parameter modality": (named_modality, lambda f: f(OUT, "T1")),
    "parameter modality as a list of flags": (
        named_modality,
        lambda f: f(OUT, [True, False, False]),
    ),
    "before further arguments": (batch_first, lambda f: f(T1_BATCH, 1, 2)),
    "function of a class": (of_a_class, lambda f: f(SimpleNamespace(modality="dMRI"), T1_BATCH)),
    "parameter modality as index": (named_modality, lambda f: f(OUT, torch.tensor([0, 0]))),
    "parameter modalities": (named_modalities, lambda f: f(OUT, ["T1"])),
    "parameter modalities by keyword": (named_modalities, lambda f: f(OUT, modalities=["T1"])),
    "module": (Criterion(), lambda f: f(OUT, T1_BATCH)),
    "module with the parameter": (Weighted(), lambda f: f(OUT, ["T1"])),
    "module with the parameter by keyword": (Weighted(), lambda f: f(OUT, modalities=["T1"])),
    "module with a call of its own": (OwnCall(), lambda f: f(OUT, batch=T1_BATCH)),
    "keyword of a partial": (partial(plain, batch=T1_BATCH), lambda f: f(OUT)),
    "argument of a partial": (partial(variadic, OUT, T1_BATCH), lambda f: f()),
    "partial of a partial": (
        partial(partial(variadic, OUT), T1_BATCH),
        lambda f: f({"modality": "dMRI"}),
    ),
    "metadata in a partial": (partial(named_modality, modality="T1"), lambda f: f(OUT)),
    "keyword over a partial": (
        partial(named_modality, modality="dMRI"),
        lambda f: f(OUT, modality="T1"),
    ),
    "batch that can be called": (plain, lambda f: f(OUT, CallableBatch(modality=["T1"]))),
    "callable with a field of that name": (
        reducing,
        lambda f: f(OUT, Reduction("dMRI"), T1_BATCH),
    ),
    "builtin": (torch.dist, lambda f: f(OUT, torch.zeros(()), modalities="T1")),
}


@pytest.mark.parametrize(("loss_fn", "call"), CALLS.values(), ids=CALLS)
def test_every_way_to_call_a_wrapped_loss(
    loss_fn: Callable[..., Tensor], call: Callable[[Any], Tensor]
) -> None:
    wrapper = brain().wrapper(gradient_only=True)
    assert call(wrapper(loss_fn)).item() == 2
    assert last_report(wrapper).active == ("T1",)


class Trainer:
    """Looks like a batch: it has attributes `modality` and `modalities`."""

    modality = "dMRI"
    modalities = ("dMRI", "rsfMRI")

    def __init__(self, wrapper: DummyLossWrapper) -> None:
        self.bound = wrapper(self.compute_loss)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], scale: float = 1.0) -> Tensor:
        return OUT * scale


def test_a_method_is_not_asked_about_self() -> None:
    """Neither as a decorated function of the class nor bound; nor is the model asked."""
    case = brain()
    wrapper = case.wrapper()
    trainer = Trainer(wrapper)
    for call in (partial(wrapper(Trainer.compute_loss), trainer), trainer.bound):
        call(case.model, T1_BATCH)
        assert last_report(wrapper).active == ("T1",)


def test_a_wrapped_function_looks_like_the_original() -> None:
    wrapped = brain().wrapper()(plain)
    assert wrapped.__name__ == "plain"
    assert vars(wrapped)["note"] == plain.note  # type: ignore[attr-defined]
    assert inspect.signature(wrapped) == inspect.signature(plain)
    assert "_modules" not in vars(brain().wrapper()(Criterion()))


def test_the_batch_is_read_before_the_loss_function_runs() -> None:
    """HF models pop entries from the batch while they compute the loss."""
    wrapper = brain().wrapper()

    @wrapper
    def loss(batch: dict[str, Any]) -> Tensor:
        batch.clear()
        return OUT

    loss(dict(T1_BATCH))
    assert last_report(wrapper).active == ("T1",)


def test_an_unknown_name_under_an_explicit_key_raises_at_once() -> None:
    """Even if a later argument could be read."""
    with pytest.raises(UnknownModalityError, match=r"'t1'.*did you mean 'T1'"):
        brain().wrapper()(variadic)(OUT, {"modality": "t1"}, T1_BATCH)


def test_a_function_without_a_signature_is_read_by_position() -> None:
    """Some builtins have none that `inspect` could find."""
    wrapped = brain().wrapper()(max)
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(max)
    assert wrapped(OUT, torch.tensor(1.0), modalities=KNOWN) is OUT
    with pytest.raises(BatchMetadataError, match="argument 1: a Tensor of shape"):
        wrapped(OUT, torch.tensor(1.0))


NEVER_ASKED: list[Any] = [
    *(X, np.zeros(2), 1, 2.0, "mean", b"T1", None, True, nn.Linear(1, 1), len),
    *([], [[], []], (), ["a photo of T1"], [["sub-01.nii"], ["sub-02.nii"]]),
    *([X], [X > 0], [[0, 1]], [[None]]),
]
ASKED: list[Any] = [{"x": X}, ["T1"], ["T1", "x"], [[], ["T1"]], [{"x": X}], SimpleNamespace(x=X)]


@pytest.mark.parametrize("argument", NEVER_ASKED + ASKED, ids=repr)
def test_arguments_that_are_asked(argument: Any) -> None:
    is_asked = any(argument is asked for asked in ASKED)
    assert may_contain_metadata(argument, KNOWN) == is_asked


CAPTIONS: dict[str, Any] = {
    "all of them names": ["T1", "T1"],
    "one of them a name": ["T1", "a brain"],
    "nested": [["T1"], ["a brain", "T1"]],
    "a tuple": ("T1",),
    "none of them a name": ["a brain"],
}


@pytest.mark.parametrize("resolver", [None, lambda batch: batch.get("names")])
@pytest.mark.parametrize("captions", CAPTIONS.values(), ids=CAPTIONS)
def test_captions_do_not_win_over_a_batch(captions: Any, resolver: Any) -> None:
    wrapper = brain().wrapper(resolver=resolver)
    batch = {"dMRI": X, "names": ["dMRI"]}
    for arguments in ((captions, batch), (batch, captions)):
        wrapper(variadic)(OUT, *arguments)
        assert last_report(wrapper).active == ("dMRI",)


def test_a_list_of_names_is_read_if_nothing_else_is_a_batch() -> None:
    wrapper = brain().wrapper()
    wrapper(variadic)(OUT, ["T1", "dMRI"], {"labels": X})
    assert last_report(wrapper).active == ("T1", "dMRI")
    with pytest.raises(UnknownModalityError, match="'a brain'"):
        wrapper(variadic)(OUT, ["T1", "a brain"], {"labels": X})


# --- Copies and pickles -----------------------------------------------------------------------

GLOBAL_WRAPPER = brain().wrapper()


@GLOBAL_WRAPPER
def decorated(output: Tensor, batch: Any) -> Tensor:
    return output


class WithCriterion(nn.Module):
    """A model that keeps its wrapped loss functions."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("T1", "dMRI")})
        wrapper = DummyLossWrapper(self, {name: f"towers.{name}" for name in self.towers})
        self.criterion = wrapper(nn.MSELoss())
        self.function = wrapper(mse_loss)
        self.decorated = decorated


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("name", ["criterion", "function"])
def test_the_copy_of_a_model_gives_dummy_gradients_to_itself(
    copied: Callable[[Any], Any], name: str
) -> None:
    model = WithCriterion()
    other = copied(model)
    output = other.towers["T1"](X)
    getattr(other, name)(output, output.detach() + 1, modalities="T1").backward()
    assert other.towers["dMRI"].weight.grad.unique().tolist() == [pytest.approx(1e-7)]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert wrappers_in(other)[0].parameters.model is other


def test_a_decorated_function_is_pickled_by_name() -> None:
    """In a new process it has the wrapper of that process, and is not sent with its model."""
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    assert copy.copy(decorated) is decorated
    assert copy.deepcopy(decorated).wrapper is not GLOBAL_WRAPPER


def test_a_wrapped_loss_is_short_in_messages() -> None:
    text = repr(brain().wrapper()(nn.MSELoss()))
    assert text == "<a MSELoss module, wrapped by a DummyLossWrapper>"


# --- A resolver -------------------------------------------------------------------------------


def test_a_resolver_replaces_the_default_reader() -> None:
    """It is asked about each argument that could be a batch, until it can read one."""
    asked = []

    def resolver(batch: Any) -> Any:
        asked.append(batch)
        return (name for name in batch["scans"])

    wrapper = brain().wrapper(resolver=resolver)
    decoy, batch = {"T1": 1}, {"scans": ["T1"]}
    wrapper(variadic)(OUT, decoy, batch)
    assert asked == [decoy, batch]
    assert last_report(wrapper).active == ("T1",)
    wrapper.total(OUT, {"scans": ["dMRI"]})
    assert last_report(wrapper).active == ("dMRI",)
    wrapper(variadic)(OUT, batch, modalities=["rsfMRI"])
    assert last_report(wrapper).active == ("rsfMRI",)


@pytest.mark.parametrize(
    "answer",
    [
        "T1",
        ("T1",),
        [["T1"], ["T1"]],
        {"T1": True, "dMRI": False},
        torch.tensor([True, False, False]),
        [True, False, False],
        ["T1", None],
    ],
    ids=["name", "tuple", "per sample", "flags", "mask", "list of flags", "with None"],
)
def test_a_resolver_may_return_any_form(answer: Any) -> None:
    wrapper = brain().wrapper(resolver=lambda batch: answer)
    wrapper.total(OUT, {})
    assert last_report(wrapper).active == ("T1",)


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
    wrapper(variadic)(OUT, {"logits": OUT}, {"scans": ["T1"]})
    assert last_report(wrapper).active == ("T1",)


def test_a_resolver_may_read_what_the_default_reader_would_skip() -> None:
    """A list of file names says nothing to us, but it may to the user."""
    wrapper = brain().wrapper(resolver=lambda files: [file.split("_")[1] for file in files])
    wrapper(variadic)(OUT, ["sub-01_T1", "sub-02_dMRI"])
    assert last_report(wrapper).active == ("T1", "dMRI")


def test_a_bug_in_a_resolver_is_not_swallowed() -> None:
    """In `total` as it is; in a call, where other arguments are tried, in the message."""
    wrapper = brain().wrapper(resolver=lambda batch: batch["scans"])
    with pytest.raises(KeyError, match="scans"):
        wrapper.total(OUT, T1_BATCH)
    with pytest.raises(BatchMetadataError, match="raised KeyError: 'scans'"):
        wrapper(plain)(OUT, T1_BATCH)
    silent = brain().wrapper(resolver=lambda batch: None)
    with pytest.raises(BatchMetadataError, match=r"`resolver` returned None"):
        silent(plain)(OUT, T1_BATCH)


# --- The loss in what a loss function returns -------------------------------------------------

LOGITS = torch.zeros(2)
TOTAL = torch.tensor(3.0)

Named = namedtuple("Named", ["logits", "loss"])  # loss is not first
Unnamed = namedtuple("Unnamed", ["value", "logits"])


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Frozen:
    loss: Tensor
    logits: Tensor


@dataclass(slots=True)
class Slotted:
    loss: Tensor
    logits: Tensor


class ModelOutput(OrderedDict[str, Any]):
    """As in transformers: a mapping whose items are attributes too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class AttrDict(dict[str, Any]):
    """Common, and a copy of it has attributes of its own."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.__dict__ = self


class TupleWithLoss(tuple[Any, ...]):
    loss: Tensor

    @classmethod
    def of(cls, loss: Tensor) -> "TupleWithLoss":
        made = cls((LOGITS, LOGITS))
        made.loss = loss
        return made


class ListWithName(list[Any]):
    name = "kept"


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda loss: (loss, LOGITS),
    "list": lambda loss: [loss, LOGITS],
    "list subclass": lambda loss: ListWithName([loss, LOGITS]),
    "dict": lambda loss: {"logits": LOGITS, "loss": loss},
    "user dict": lambda loss: UserDict(loss=loss, logits=LOGITS),
    "attribute dict": lambda loss: AttrDict(loss=loss, logits=LOGITS),
    "model output": lambda loss: ModelOutput(loss=loss, logits=LOGITS),
    "named tuple with loss": lambda loss: Named(LOGITS, loss),
    "named tuple without": lambda loss: Unnamed(loss, LOGITS),
    "tuple with an attribute": TupleWithLoss.of,
    "dataclass": lambda loss: Output(loss, LOGITS),
    "frozen dataclass": lambda loss: Frozen(loss, LOGITS),
    "dataclass with slots": lambda loss: Slotted(loss, LOGITS),
    "object": lambda loss: SimpleNamespace(loss=loss, logits=LOGITS),
}


def logits_of(container: Any) -> Any:
    if isinstance(container, (list, tuple)):
        return next(item for item in container if item is LOGITS)
    return container["logits"] if hasattr(container, "keys") else container.logits


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_a_wrapped_loss_puts_the_total_into_its_result(make: Callable[[Tensor], Any]) -> None:
    def loss_fn(output: Tensor, batch: Any) -> Any:
        return make(output)

    wrapper = brain().wrapper()
    result = wrapper(loss_fn)(OUT, T1_BATCH)
    loss = find_loss(result)[1]
    assert isinstance(loss, Tensor)
    assert torch.equal(loss, OUT + last_report(wrapper).dummy)
    assert loss is not OUT
    assert logits_of(result) is LOGITS


def test_a_loss_without_gradients_gets_all_of_its_arguments() -> None:
    with torch.no_grad():
        assert brain().wrapper()(keyword_only)(OUT, batch=T1_BATCH).item() == 2


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_only_the_loss_is_replaced_and_on_a_copy(make: Callable[[Tensor], Any]) -> None:
    """The new container is of the same type, contains the rest as it was, and shares no state."""
    result = make(OUT)
    place, loss = find_loss(result)
    assert loss is OUT
    changed = replace_loss(result, place, TOTAL)
    assert type(changed) is type(result)
    assert find_loss(changed)[1] is TOTAL
    assert find_loss(result)[1] is OUT
    assert logits_of(changed) is LOGITS
    assert getattr(changed, "loss", TOTAL) is TOTAL
    assert getattr(result, "loss", OUT) is OUT
    if isinstance(changed, ListWithName):
        assert changed.name == "kept"


def test_an_item_with_the_name_of_an_inner_attribute() -> None:
    """A `UserDict` keeps its items in the attribute `data`, which is not the item `data`."""
    changed = with_item(UserDict(data=OUT, logits=LOGITS), "data", TOTAL)
    assert changed == {"data": TOTAL, "logits": LOGITS}


def test_a_result_that_cannot_be_copied() -> None:
    class Raising(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)  # also for `__setstate__`, which `copy` looks for

    with pytest.raises(TypeError, match="cannot be replaced on a copy"):
        replace_loss(Raising(loss=OUT), "loss", TOTAL)
