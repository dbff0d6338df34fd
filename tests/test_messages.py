"""Every rejected input: the error names the value and the next action, and nothing is changed."""

import copy
import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from modaldummy import (
    BatchMetadataError,
    DummyLossWrapper,
    ModalDummyError,
    ParameterMapError,
    UnknownModalityError,
    active_modalities,
    attach_to_outputs,
    check_ranks,
    hold_inactive,
    preflight,
)
from modaldummy._errors import packages_needed
from tests.zoo import T1, Brain, brain

X = torch.zeros(2, 3)
REAL = torch.tensor(2.0)


def make(spec: Any, **options: Any) -> Any:
    return DummyLossWrapper(Brain(), {"T1": spec}, **options)


def make_map(spec: Any) -> Any:
    return DummyLossWrapper(Brain(), spec)


MAPS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "path that matches nothing": (
        lambda: make("vision_tower.T1_embed"),
        ParameterMapError,
        ["['T1']", "'vision_tower.T1_embed' matches no", "Brain", f"closest: '{T1}'"],
    ),
    "typo in the path of a parameter": (
        lambda: make("trunk.wieght"),
        ParameterMapError,
        ["closest: 'trunk.weight'"],
    ),
    "substring of a module": (lambda: make("T1"), ParameterMapError, [f"'{T1}'", "segment"]),
    "substring of another": (lambda: make("T10"), ParameterMapError, ["closest: 'T10_proj'"]),
    "wrapper segment alone": (lambda: make("module"), ParameterMapError, ["'module' matches no"]),
    "empty path": (lambda: make(""), ParameterMapError, ["'' matches no"]),
    "path far from all": (lambda: make("zzz"), ParameterMapError, ["'zzz' matches no", "Brain. A"]),
    "glob that matches modules only": (
        lambda: make("*T1_patch_embed"),
        ParameterMapError,
        ["'*T1_patch_embed' matches no", T1, "full parameter names"],
    ),
    "one bad path among good ones": (lambda: make([T1, "nope"]), ParameterMapError, ["'nope'"]),
    "empty list": (lambda: make([]), ParameterMapError, ["['T1']` is empty", "drop the key"]),
    "module without parameters": (
        lambda: DummyLossWrapper(nn.Sequential(nn.ReLU()), {"T1": "0"}),
        ParameterMapError,
        ["module '0' has no parameters", "Leave it out"],
    ),
    "the same as a module": (
        lambda: DummyLossWrapper(model := nn.Sequential(nn.ReLU()), {"T1": model[0]}),
        ParameterMapError,
        ["module '0' has no parameters", "Leave it out"],
    ),
    "parameter of another model": (
        lambda: make(nn.Parameter(X)),
        ParameterMapError,
        ["shape [2, 3]", "not part of Brain"],
    ),
    "module of another model": (
        lambda: make(nn.Linear(1, 1)),
        ParameterMapError,
        ["Linear module that is not part of Brain", "pass as `model`"],
    ),
    "tensor": (lambda: make(X), ParameterMapError, ["must be a path", "a Tensor of shape [2, 3]"]),
    "number": (lambda: make(7), ParameterMapError, ["got 7 (int)"]),
    "bytes": (lambda: make(b"fusion"), ParameterMapError, ["(bytes)"]),
    "dict as spec": (
        lambda: make({"fusion": 1}),
        ParameterMapError,
        ["a dict with the keys ['fusion']"],
    ),
    "None as spec": (lambda: make([None]), ParameterMapError, ["got None"]),
    "empty map": (
        lambda: make_map({}),
        ParameterMapError,
        ["non-empty mapping", "a dict with the keys []"],
    ),
    "list as map": (lambda: make_map(["T1"]), ParameterMapError, ["got ['T1']"]),
    "number as key": (lambda: make_map({1: "fusion"}), ParameterMapError, ["Keys", "got 1"]),
    "empty key": (lambda: make_map({"": "fusion"}), ParameterMapError, ["got ''"]),
    "empty tuple as key": (lambda: make_map({(): "fusion"}), ParameterMapError, ["got ()"]),
    "number in a tuple key": (lambda: make_map({("T1", 2): "fusion"}), ParameterMapError, ["2)"]),
    "twice in a tuple key": (
        lambda: make_map({("T1", "T1"): "fusion"}),
        ParameterMapError,
        ["different names", "('T1', 'T1')"],
    ),
    "the same modalities twice": (
        lambda: make_map({("T1", "dMRI"): "fusion", ("dMRI", "T1"): "trunk"}),
        ParameterMapError,
        ["('T1', 'dMRI')", "('dMRI', 'T1')", "same modalities"],
    ),
    "a name that reads like a tuple": (
        lambda: make_map({("T1", "dMRI"): "fusion", "T1-dMRI": "trunk"}),
        ParameterMapError,
        ["('T1', 'dMRI')", "'T1-dMRI'", "both written", "Rename"],
    ),
    "two tuples that read the same": (
        lambda: make_map({("T1", "dMRI-post"): "fusion", ("T1-dMRI", "post"): "trunk"}),
        ParameterMapError,
        ["('T1', 'dMRI-post')", "both written 'T1-dMRI-post'"],
    ),
    "a modality that reads like a tuple": (
        lambda: make_map({("T1", "dMRI"): "fusion", ("T1-dMRI", "post"): "trunk"}),
        ParameterMapError,
        ["('T1', 'dMRI')", "'T1-dMRI'", "both written", "Rename"],
    ),
    "names that print alike": (
        lambda: make_map({"T\u00e9": "fusion", "Te\u0301": "trunk"}),
        ParameterMapError,
        [r"'T\xe9' and 'Te\u0301'", "both written", "Rename"],
    ),
    "names in a tuple that print alike": (
        lambda: make_map({("T\u00e9", "Te\u0301"): "fusion"}),
        ParameterMapError,
        [r"'T\xe9' and 'Te\u0301'", "both written"],
    ),
    "path that prints like another": (
        lambda: DummyLossWrapper(nn.ModuleDict({"T\u00e9": nn.Linear(1, 1)}), {"T1": "Te\u0301"}),
        ParameterMapError,
        ["matches no parameter", r"'T\xe9' prints alike", r"Unicode characters than 'Te\u0301'"],
    ),
    "glob that prints like another": (
        lambda: DummyLossWrapper(
            nn.ModuleDict({"Te\u0301": nn.Linear(1, 1)}), {"T1": "T\u00e9.w*"}
        ),
        ParameterMapError,
        [r"'Te\u0301.weight' prints alike", r"than 'T\xe9.w*'"],
    ),
    **{
        f"a name that breaks logs: {key!r}": (
            functools.partial(make_map, {key: "fusion"}),
            ParameterMapError,
            [f"the modality {name!r}", "'grad/[inactive]/...'", "Rename it"],
        )
        for name in ("active", "inactive", "T1]", "T1 ", "\tT1", "T1\npost", "T1__MAX", "T1__MIN")
        for key in (name, (name, "dMRI"))
    },
    "a name and its 1-tuple": (
        lambda: make_map({"T1": "fusion", ("T1",): "trunk"}),
        ParameterMapError,
        ["same modalities"],
    ),
    "no module as model": (
        lambda: DummyLossWrapper([X] * 1000, {"T1": "fusion"}),  # type: ignore[arg-type]
        TypeError,
        ["`model` must be a torch.nn.Module", "(list)"],
    ),
    "optimizer as model": (
        lambda: DummyLossWrapper(SGD([X]), {"T1": "fusion"}),  # type: ignore[arg-type]
        TypeError,
        ["`model` must be a torch.nn.Module", "(SGD)"],
    ),
    "scale": (lambda: make(T1, scale="1e-7"), TypeError, ["`scale`", "or None", "got '1e-7'"]),
    "max_fraction": (
        lambda: make(T1, max_fraction=-1),
        ValueError,
        ["`max_fraction`", "or None", "got -1"],
    ),
    "gradient_only": (
        lambda: make(T1, gradient_only="no"),
        TypeError,
        ["`gradient_only` must be a bool", "'no'"],
    ),
    "resolver": (lambda: make(T1, resolver="T1"), TypeError, ["`resolver`", "got 'T1'"]),
    "modality asked for": (
        lambda: brain().wrapper().named_parameters("rsfmri"),
        UnknownModalityError,
        ["'rsfmri'", "did you mean 'rsfMRI'?", "'T1', 'rsfMRI', 'dMRI'"],
    ),
    "number asked for": (
        lambda: brain().wrapper().named_parameters(5),  # type: ignore[arg-type]
        UnknownModalityError,
        ["5 (int)"],
    ),
    "list asked for": (
        lambda: brain().wrapper().named_parameters(["T1"]),  # type: ignore[arg-type]
        UnknownModalityError,
        ["['T1'] (list)"],
    ),
    "tuple key asked for": (
        lambda: brain().wrapper().named_parameters(("T1", "PET")),
        UnknownModalityError,
        ["'PET'"],
    ),
}


@dataclass
class Locked:
    """Its loss cannot be replaced."""

    x: int = 1

    @property
    def loss(self) -> torch.Tensor:
        return REAL


def _nested(depth: int) -> Any:
    batch: Any = "T1"
    for _ in range(depth):
        batch = [batch]
    return batch


def _endless() -> Any:
    batch: dict[str, Any] = {}
    batch["modality"] = batch
    return batch


@pytest.mark.parametrize(("spec", "number"), [("*.", 0), ("[.", 0), ("", 0), ("patch_embed", 3)])
def test_at_most_three_paths_are_suggested(spec: str, number: int) -> None:
    """Those that look like the last word of the path, if there is one."""
    with pytest.raises(ParameterMapError) as error:
        make(spec)
    closest = re.search("; closest: (.*?)\\. A path", str(error.value))
    assert (closest.group(1).count("'") // 2 if closest else 0) == number


BATCHES: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "unknown name": ("PET", UnknownModalityError, ["`batch` names the modality 'PET'", "'rsfMRI'"]),
    "name in another case": ("t1", UnknownModalityError, ["did you mean 'T1'?"]),
    "unknown name in a list": (["T1", "T2"], UnknownModalityError, ["`batch`[1]", "'T2'"]),
    "unknown name in an array": (np.array(["T3"]), UnknownModalityError, ["'T3'"]),
    "typo under an explicit key": (
        {"modality": ["T1", "rsfmri"]},
        UnknownModalityError,
        ["`batch`['modality'][1]", "'rsfmri'", "did you mean 'rsfMRI'?"],
    ),
    "typo in flags under an explicit key": (
        {"modalities": {"T1": True, "dmri": True}},
        UnknownModalityError,
        ["'dmri'", "did you mean 'dMRI'?"],
    ),
    "number as a key of flags": ({"modalities": {5: True}}, UnknownModalityError, ["5 (int)"]),
    "typo in an attribute": (SimpleNamespace(modality="T"), UnknownModalityError, [".modality"]),
    "list of bools": ([True, False, True], BatchMetadataError, ["`batch` does not say which"]),
    "floats for indexes": (np.array([0.0, 1.0]), BatchMetadataError, ["which names no modality"]),
    "tensor as a key": ({torch.ones(2): X}, BatchMetadataError, ["`batch` does not say which"]),
    "number as name": ({"modality": [1.5]}, BatchMetadataError, ["['modality'][0]", "1.5 (float)"]),
    "flag 0": ({"T1": X, "dMRI": 0}, BatchMetadataError, ["['dMRI']", "0 (int)", "True or False"]),
    "flag 1.0": ({"dMRI": 1.0}, BatchMetadataError, ["['dMRI']", "1.0 (float)"]),
    "flag of numpy": ({"dMRI": np.float32(1)}, BatchMetadataError, ["['dMRI']"]),
    "flag as 0-d tensor": ({"dMRI": torch.tensor(1)}, BatchMetadataError, ["shape [] ", "int64"]),
    "nothing recognised": (
        {"input_ids": X, "labels": X},
        BatchMetadataError,
        ["'input_ids'", "modalities=['T1']", "batch['modalities'] = ['T1']", "resolver="],
    ),
    "typo in a key": ({"T_1": X}, BatchMetadataError, ["Did you mean 'T1' by 'T_1'?"]),
    "typo in an explicit key": (
        {"modalties": ["T1"]},
        BatchMetadataError,
        ["Did you mean 'modalities' by 'modalties'?"],
    ),
    "nothing active, maybe": (
        {"modality_inputs": {}, "input_ids": X},
        BatchMetadataError,
        ["'input_ids']. Known modalities", "`[]` if there are none"],
    ),
    "missing modalities": ({"missing": ["T1"]}, BatchMetadataError, ["does not say", "'missing'"]),
    "None": (None, BatchMetadataError, ["None (NoneType)"]),
    "object": (Locked(), BatchMetadataError, ["does not say", "Locked"]),
    "class": (dict, BatchMetadataError, ["does not say"]),
    "class with the attribute": (
        type("Scan", (), {"modality": "T1"}),
        BatchMetadataError,
        ["does not say"],
    ),
    "generator": (
        (name for name in ["T1"]),
        BatchMetadataError,
        ["generator", "use it up; pass a list"],
    ),
    "float tensor": (X, BatchMetadataError, ["shape [2, 3] and dtype torch.float32", "[B, 3]"]),
    "2-d integers": (torch.zeros(2, 3, dtype=torch.int64), BatchMetadataError, ["int64"]),
    "0-d integer": (torch.tensor(1), BatchMetadataError, ["shape []"]),
    "uint8": (
        torch.tensor([1, 0, 1], dtype=torch.uint8),
        BatchMetadataError,
        ["uint8", "bool or to int64"],
    ),
    "collated flags": (
        {"modalities": {"T1": torch.tensor([1, 1]), "dMRI": torch.tensor([0, 0])}},
        BatchMetadataError,
        ["['modalities']['T1']", "could be flags", "bools"],
    ),
    "list of flags": (
        {"modalities": {"T1": [1, 1], "dMRI": [0, 0]}},
        BatchMetadataError,
        ["['modalities']['T1']", "could be flags"],
    ),
    "explicit None alone": ({"modality": None}, BatchMetadataError, ["keys ['modality']. Known"]),
    "mask too wide": (torch.ones(4, dtype=torch.bool), BatchMetadataError, ["[4]", "[B, 3]"]),
    "mask too narrow": (np.ones((5, 2), bool), BatchMetadataError, ["[5, 2]", "T1, rsfMRI, dMRI"]),
    "mask of three dimensions": (torch.ones(2, 2, 3) > 0, BatchMetadataError, ["[2, 2, 3]"]),
    "mask under an explicit key": (
        {"modality": [True, False]},
        BatchMetadataError,
        ["['modality']", "[2]"],
    ),
    "misspelt after other keys": (
        {0: X, "subject": X, "modalites": ["T1"]},
        BatchMetadataError,
        ["Did you mean 'modalities' by 'modalites'?"],
    ),
    "index too large": (torch.tensor([0, 3]), BatchMetadataError, ["index 3", "0 to 2"]),
    "index too small": (np.array([-2]), BatchMetadataError, ["index -2", "-1 for none"]),
    "list of numbers": ([0, 1], BatchMetadataError, ["does not say", "[0, 1]"]),
    "bools and numbers": ({"modality": [True, 2]}, BatchMetadataError, ["['modality'][0]"]),
    "list of integers under an explicit key": (
        {"modality": [0, 1, 1]},
        BatchMetadataError,
        ["['modality'][0]", "0 (int)", "flags or indexes", "integer array"],
    ),
    "index under an explicit key": ({"modality": 1}, BatchMetadataError, ["1 (int)"]),
    "batch with its targets": (
        ({"modality": "T1"}, X),
        BatchMetadataError,
        ["`batch`[1]", "shape [2, 3]", "(inputs, targets), pass the item"],
    ),
    "sample without metadata": (
        [{"modality": "T1"}, {"x": X}],
        BatchMetadataError,
        ["`batch`[1]", "keys ['x']", "`'modalities': []` in a dict"],
    ),
    "None among samples": ([["T1"], None], BatchMetadataError, ["`batch`[1]", "None"]),
    "contradiction": (
        {"pixels": {"T1": X}, "mask": {"T1": X, "dMRI": X}},
        BatchMetadataError,
        ["contradictory", "'pixels': ['T1']", "'mask': ['T1', 'dMRI']"],
    ),
    "too deep": (_nested(40), BatchMetadataError, ["more than 16 levels", "pass a list of names"]),
    "endless": (_endless(), BatchMetadataError, ["more than 16 levels", "pass a list of names"]),
}


RESULTS: dict[str, tuple[Any, list[str]]] = {
    "None": (None, ["must return a tensor", "None (NoneType)"]),
    "float": (0.5, ["The return value of `loss_fn`", "0.5 (float)", "Drop `.item()`"]),
    "number first": ((np.float32(0.5), X), ["`loss_fn(...)[0]`", "Drop `.item()`"]),
    "empty tuple": ((), ["got ()"]),
    "tuple that starts with None": ((None, X), ["`loss_fn(...)[0]` must be a tensor", "None"]),
    "dict without loss": ({"logits": X}, ["must return", "'logits'"]),
    "dict with loss None": ({"loss": None}, ["`loss_fn(...)['loss']` must be a tensor", "None"]),
    "object with loss None": (SimpleNamespace(loss=None), ["`loss_fn(...).loss`", "None"]),
    "complex": (torch.tensor(1j), ["real-valued", "complex64", "`.real` or `.abs()`"]),
}


def assert_says(error: pytest.ExceptionInfo[Exception], parts: list[str]) -> None:
    assert len(str(error.value)) < 1000, "the value is not shortened"
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {error.value}"


@pytest.mark.parametrize(("call", "kind", "parts"), MAPS.values(), ids=MAPS.keys())
def test_maps_and_options(call: Callable[[], Any], kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as error:
        call()
    assert_says(error, parts)
    assert "\n" not in str(error.value), "the value takes several lines"


@pytest.mark.parametrize(
    ("call", "second"),
    [
        (hold_inactive, SGD([X])),
        (preflight, SGD([X])),
        (check_ranks, {"T1": X}),
        (attach_to_outputs, nn.Linear(1, 1)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_first_two_arguments_are_swapped(call: Callable[..., Any], second: Any) -> None:
    wrapper = brain().wrapper()
    for arguments, swapped in [((second, wrapper), True), ((second, second), False)]:
        with pytest.raises(TypeError) as error:
            call(*arguments)
        assert_says(error, ["`wrapper` must be a DummyLossWrapper, got ", type(second).__name__])
        assert str(error.value).endswith(" Swap the first two arguments.") is swapped


@pytest.mark.parametrize(("batch", "kind", "parts"), BATCHES.values(), ids=BATCHES.keys())
def test_batches(batch: Any, kind: type[Exception], parts: list[str]) -> None:
    case = brain()
    wrapper = case.wrapper()
    model = copy.deepcopy(case.model.state_dict())
    before = repr(batch)
    for call in (wrapper.total, lambda _, batch: wrapper.dummy(batch)):
        with pytest.raises(kind) as error:
            call(REAL, batch)
        assert_says(error, parts)
    assert repr(batch) == before
    assert wrapper.last is None
    assert all(torch.equal(value, model[key]) for key, value in case.model.state_dict().items())


@pytest.mark.parametrize("batch", ["unknown", X, X > 0, torch.tensor([1000])], ids=repr)
def test_a_message_lists_some_of_many_modalities(batch: Any) -> None:
    with pytest.raises(ModalDummyError, match=r"m19'?, and 980 more") as error:
        active_modalities(batch, [f"m{number}" for number in range(1000)])
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(("result", "parts"), RESULTS.values(), ids=RESULTS.keys())
def test_results_of_a_loss_function(result: Any, parts: list[str]) -> None:
    wrapper = brain().wrapper()
    before = repr(result)
    with pytest.raises(TypeError) as error:
        wrapper(lambda batch: result)({"modality": "T1"})
    assert_says(error, parts)
    assert repr(result) == before
    assert wrapper.last is None


@pytest.mark.parametrize(
    "result", [MappingProxyType({"loss": REAL}), Locked()], ids=["proxy", "property"]
)
def test_a_container_that_cannot_change_says_so(result: Any) -> None:
    """And is left as it is."""
    with pytest.raises(TypeError, match=r"cannot be replaced on a copy.*instead"):
        brain().wrapper()(lambda batch: result)({"modality": "T1"})


NUMBERS = [0.5, np.float32(1), np.array(1.0)]


@pytest.mark.parametrize("real", [None, "0.5", torch.tensor(1j), *NUMBERS], ids=repr)
def test_what_is_no_loss(real: Any) -> None:
    wrapper = brain().wrapper()
    with pytest.raises(TypeError, match="`loss` must be") as error:
        wrapper.total(real, "T1")
    is_number = any(real is number for number in NUMBERS)
    assert ("Drop `.item()`, `float()` or `.numpy()`." in str(error.value)) is is_number


def test_a_tensor_in_place_of_a_loss_function() -> None:
    with pytest.raises(TypeError, match=r"must be callable.*wrapper\.total"):
        brain().wrapper()(REAL)  # type: ignore[arg-type]


def test_a_call_without_metadata_lists_what_was_looked_at() -> None:
    wrapper = brain().wrapper()
    with pytest.raises(BatchMetadataError) as error:
        wrapper(lambda output, batch, names, **rest: REAL)(X, {"ids": X}, ["a scan"], flag=True)
    assert_says(
        error,
        [
            "output: a Tensor of shape [2, 3] and dtype torch.float32 (not asked)",
            "batch: a dict with the keys ['ids']",
            "names: ['a scan'] (list) (not asked)",
            "flag: True (bool) (not asked)",
            "Known modalities: 'T1', 'rsfMRI', 'dMRI'",
            "modalities=['T1']",
        ],
    )


def test_a_trainer_like_self_is_no_batch() -> None:
    """Its attributes would be found; the error says that nothing was."""

    class Trainer:
        modality = "T1"

        def compute_loss(self, model: nn.Module, inputs: Any) -> Any:
            return REAL

    wrapped = brain().wrapper()(Trainer.compute_loss)
    with pytest.raises(BatchMetadataError, match=r"model: a Brain module \(not asked\)"):
        wrapped(Trainer(), Brain(), {"x": X})


def test_wrong_arguments_raise_what_the_loss_function_would() -> None:
    with pytest.raises(TypeError, match="inputs"):
        brain().wrapper()(lambda model, inputs: REAL)(Brain(), modalities="T1")


@pytest.mark.parametrize("names", [["PET"], "PET", {"PET": True}, [1], 5, {"T1": 1}])
def test_a_resolver_that_returns_no_modality(names: Any) -> None:
    kinds = (UnknownModalityError, BatchMetadataError)
    with pytest.raises(kinds, match="The result of `resolver`"):
        brain().wrapper(resolver=lambda batch: names).total(REAL, {})


def test_a_resolver_that_returns_none() -> None:
    with pytest.raises(BatchMetadataError, match=r"returned None.*empty list"):
        brain().wrapper(resolver=lambda batch: None).total(REAL, {})


@pytest.mark.parametrize("kind", [UnknownModalityError, BatchMetadataError, ParameterMapError])
def test_every_error_is_ours_and_a_value_error(kind: type[Exception]) -> None:
    assert issubclass(kind, ModalDummyError)
    assert issubclass(kind, ValueError)


@pytest.mark.parametrize("form", [lambda name: [name], lambda name: {name: X, "T1": X}])
@pytest.mark.parametrize("names", [("é", "e\u0301"), ("e\u0301", "é"), ("dé", "de\u0301")])
def test_names_that_print_alike(form: Callable[[str], Any], names: tuple[str, str]) -> None:
    """Even a key beside a good one, where a misspelt key is ignored."""
    known, given = names
    with pytest.raises(UnknownModalityError) as error:
        active_modalities(form(given), [known, "T1"])
    told = f"did you mean {known!r}? That is {known!a}, not {given!a}."
    assert_says(error, [told])
    assert active_modalities(form(known), [known, "T1"])[0] == known


def test_a_string_is_no_sequence_of_modalities() -> None:
    """It would be read letter by letter."""
    with pytest.raises(TypeError, match="sequence of names, got 'T1'"):
        active_modalities("T1", "T1")


def test_followed_advice_works() -> None:
    """Each of the ways out that the message names, with the name that it gives."""
    wrapper = DummyLossWrapper(Brain(), {"audio": T1, "video": "fusion"})
    for advice in ({"modalities": ["audio"]}, ["audio"]):
        wrapper.total(REAL, advice)
    wrapper(lambda x: REAL)(X, modalities=["audio"])
    with pytest.raises(BatchMetadataError) as error:
        wrapper.total(REAL, {"x": X})
    assert_says(error, ["batch['modalities'] = ['audio']", "modalities=['audio']", "`['audio']`"])


def test_a_missing_package_is_named_as_it_is_installed() -> None:
    text = "No module named 'nothing'. Install it: pip install some thing"
    with pytest.raises(ModuleNotFoundError, match=text), packages_needed("some thing"):
        importlib.import_module("nothing")
