"""Which parameters a map selects: every form of spec, and models that change afterwards."""

import copy
from collections.abc import Callable
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

from modaldummy import DummyLossWrapper, ParameterMapError, gradient_norms
from modaldummy._core import parameter_map
from modaldummy._core.batch import BatchReader
from modaldummy._core.paths import strip_wrappers
from modaldummy._ownership import shared_with_trunk
from tests.asserts import connected
from tests.zoo import T1, WAYS, ZOO, Brain, Key, brain

RSFMRI, DMRI = "vision_tower.rsfMRI_patch_embed", "vision_tower.dMRI_patch_embed"
BOTH = {f"{T1}.weight", f"{T1}.bias"}


def selected(spec: Any, model: Brain | None = None) -> set[str]:
    """Names that a map of one modality with this spec selects."""
    model = Brain() if model is None else model
    return set(DummyLossWrapper(model, {"T1": spec}).named_parameters("T1"))


SPECS: dict[str, tuple[Callable[[Brain], Any], set[str]]] = {
    "path of a module": (lambda _: T1, BOTH),
    "path of a parameter": (lambda _: f"{T1}.bias", {f"{T1}.bias"}),
    "glob": (lambda _: "vision_tower.T1_*", BOTH),
    "glob with ?": (lambda _: "*T1_patch_embed.?ias", {f"{T1}.bias"}),
    "glob with []": (lambda _: "vision_tower.[T]1_*.bias", {f"{T1}.bias"}),
    "path with wrapper segments": (lambda _: f"module._orig_mod.{T1}.bias", {f"{T1}.bias"}),
    "glob with wrapper segments": (lambda _: f"module.{T1}.*", BOTH),
    "path with PEFT's segments": (lambda _: f"base_model.model.{T1}", BOTH),
    "module": (lambda m: m.vision_tower["T1_patch_embed"], BOTH),
    "parameter": (lambda m: m.vision_tower["T1_patch_embed"].bias, {f"{T1}.bias"}),
    "generator": (lambda m: m.vision_tower["T1_patch_embed"].parameters(), BOTH),
    "set": (lambda _: {T1}, BOTH),
    "nested and mixed": (
        lambda m: [m.trunk, (f"{T1}.bias", ["fusion.bias"])],
        {"trunk.weight", "trunk.bias", f"{T1}.bias", "fusion.bias"},
    ),
    "the same twice": (lambda m: [T1, m.vision_tower["T1_patch_embed"], "vision_tower.T1*"], BOTH),
    "whole model": (lambda m: m, {name for name, _ in Brain().named_parameters()}),
    "name that begins like another": (lambda _: "T10_proj", {"T10_proj.weight", "T10_proj.bias"}),
}


@pytest.mark.parametrize(("spec", "expected"), SPECS.values(), ids=SPECS.keys())
def test_every_form_of_spec(spec: Callable[[Brain], Any], expected: set[str]) -> None:
    model = Brain()
    assert selected(spec(model), model) == expected


@pytest.mark.parametrize("name", ["a[0]", "a*", "a?", "[a]"])
def test_an_exact_path_goes_before_a_glob(name: str) -> None:
    """Also where the glob would match another module."""
    for path in (name, f"{name}.bias", f"module.{name}.bias"):
        model = nn.ModuleDict({"a": nn.Linear(1, 1), "a0": nn.Linear(1, 1), name: nn.Linear(1, 1)})
        wrapper = DummyLossWrapper(model, {"T1": path})
        assert list(wrapper.named_parameters("T1"))[-1] == f"{name}.bias"
        assert all(found.startswith(name) for found in wrapper.named_parameters("T1"))
    assert len(DummyLossWrapper(model, {"T1": "a*s"}).named_parameters("T1")) > 1


def test_named_parameters_keep_frozen_ones_and_map_order() -> None:
    """`named_parameters` is about ownership; what is frozen may thaw."""
    case = brain()
    case.model.get_parameter(f"{T1}.weight").requires_grad_(False)
    wrapper = case.wrapper()
    assert list(wrapper.named_parameters("T1")) == [f"{T1}.weight", f"{T1}.bias"]
    for key in (("T1", "dMRI"), ("dMRI", "T1")):
        assert list(wrapper.named_parameters(key)) == ["fusion.weight", "fusion.bias"]
    assert wrapper.named_parameters(("T1", "rsfMRI")) == {}
    assert wrapper.modalities == ("T1", "rsfMRI", "dMRI")


def test_a_modality_may_occur_in_tuple_keys_alone() -> None:
    """It is known, and owns nothing by itself."""
    wrapper = DummyLossWrapper(Brain(), {("T1", "text"): "fusion"})
    assert wrapper.modalities == ("T1", "text")
    assert wrapper.named_parameters("text") == {}


def test_keys_may_be_enums() -> None:
    """They become plain strings, which print as they should in logs."""

    class Scan(str, Enum):  # noqa: UP042  # still common, and prints in another way
        T1 = "T1"
        DIFFUSION = "dMRI"

    wrapper = DummyLossWrapper(Brain(), {Scan.T1: T1, (Scan.T1, Scan.DIFFUSION): "fusion"})
    assert wrapper.modalities == ("T1", "dMRI")
    names = [*wrapper.modalities, *wrapper.reader.read([Scan.T1])]
    assert {type(name) for name in names} == {str}
    wrapper.total(torch.tensor(2.0), {"modality": [Scan.T1]})
    assert wrapper.last is not None
    assert "modaldummy/active/dMRI" in wrapper.last.as_dict()


def test_a_tied_parameter_goes_by_its_first_name() -> None:
    """The one that `model.named_parameters()` gives it."""
    case = ZOO["tied-within"]()
    names = set(case.wrapper().named_parameters("a"))
    assert names == {"a.0.weight", "a.0.bias"}
    assert names < set(dict(case.model.named_parameters()))
    by_list = DummyLossWrapper(case.model, {"a": ["a.1", "a.0"], "b": "b"})
    assert set(by_list.named_parameters("a")) == {"a.1.weight", "a.1.bias"}


def test_every_name_of_a_shared_module_is_known() -> None:
    """A path may be any of them; the error is that it owns nothing, not that it does not exist."""
    activation = nn.ReLU()
    model = nn.ModuleDict({"T1": nn.Linear(2, 2), "first": activation, "second": activation})
    for name in ("first", "second"):
        with pytest.raises(ParameterMapError, match=f"the module '{name}' has no parameters"):
            DummyLossWrapper(model, {"T1": name})


def test_parameters_that_only_look_like_weight_norm_are_no_match() -> None:
    """`T1_g` and `T1_v` stand for a parameter `T1` only where something computes it from them."""
    model = nn.ParameterDict({"T1_g": torch.ones(1), "T1_v": torch.ones(1), "dMRI": torch.ones(1)})
    with pytest.raises(ParameterMapError):
        DummyLossWrapper(model, {"T1": "T1"})


def test_a_submodule_with_the_name_of_a_wrapper_does_not_add_up() -> None:
    """What is directly there wins over what is one wrapper further down."""
    model = nn.ModuleDict({"enc": nn.ModuleDict({"b": nn.Linear(1, 1)})})
    model["enc"].add_module("module", nn.ModuleDict({"b": nn.Linear(2, 2), "c": nn.Linear(3, 3)}))
    wrapper = DummyLossWrapper(model, {"near": "enc.b", "far": "enc.module.b", "skip": "enc.c"})
    assert list(wrapper.named_parameters("near")) == ["enc.b.weight", "enc.b.bias"]
    assert list(wrapper.named_parameters("far")) == ["enc.module.b.weight", "enc.module.b.bias"]
    assert list(wrapper.named_parameters("skip")) == ["enc.module.c.weight", "enc.module.c.bias"]


def test_adapters_belong_to_the_layer_that_they_adapt() -> None:
    """Only a `base_layer` has adapters; a child that is called so beside a wrapper is none."""
    wrapped = nn.ModuleDict({"module": nn.Linear(1, 1), "lora_A": nn.Linear(2, 2)})
    wrapper = DummyLossWrapper(nn.ModuleDict({"enc": wrapped}), {"T1": "enc.weight"})
    assert list(wrapper.named_parameters("T1")) == ["enc.module.weight"]


def test_a_module_inside_a_wrapper_is_found_after_unwrapping() -> None:
    model = Brain()
    inner = _tower(model)
    _replace(checkpoint_wrapper)(model)
    wrapper = DummyLossWrapper(model, {"T1": inner})
    model.vision_tower["T1_patch_embed"] = inner
    assert set(wrapper.named_parameters("T1")) == BOTH


ACTIVE_KEYS: dict[str, tuple[list[str], list[Key], set[str]]] = {
    "all": (["dMRI", "T1", "rsfMRI"], ["T1", "rsfMRI", "dMRI", ("T1", "dMRI")], set()),
    "one of the pair": (["T1", "rsfMRI"], ["T1", "rsfMRI"], {DMRI, "fusion"}),
    "the pair": (["T1", "dMRI"], ["T1", "dMRI", ("T1", "dMRI")], {RSFMRI}),
    "neither": (["rsfMRI"], ["rsfMRI"], {T1, DMRI, "fusion"}),
    "nothing": ([], [], {T1, RSFMRI, DMRI, "fusion"}),
}


@pytest.mark.parametrize(("active", "keys", "modules"), ACTIVE_KEYS.values(), ids=ACTIVE_KEYS)
def test_a_tuple_key_needs_all_its_modalities(
    active: list[str], keys: list[Key], modules: set[str]
) -> None:
    """A step says which keys are active and which parameters are not, all in map order."""
    wrapper = brain().wrapper()
    step = wrapper.parameters.split(active)
    assert step.active == tuple(name for name in wrapper.modalities if name in active)
    assert step.inactive == tuple(name for name in wrapper.modalities if name not in active)
    assert step.active_keys == tuple(keys)
    in_order = [module for module in (T1, RSFMRI, DMRI, "fusion") if module in modules]
    expected = [f"{module}.{kind}" for module in in_order for kind in ("weight", "bias")]
    assert [owned.name for owned in step.inactive_parameters] == expected
    assert connected(wrapper, active) == set(expected)


def test_what_an_active_modality_shares_gets_no_dummy() -> None:
    """Tied weights: the real loss already reaches them."""
    model = Brain()
    wrapper = DummyLossWrapper(model, {"T1": [T1, "fusion"], "dMRI": ["fusion", "trunk.bias"]})
    assert connected(wrapper, ["T1"]) == {"trunk.bias"}


def test_only_what_the_trunk_names_too_is_shared_with_it() -> None:
    model = nn.ModuleDict({"T1": nn.Linear(3, 2), "head": nn.Linear(3, 2)})
    wrapper = DummyLossWrapper(model, {"T1": "T1"})
    assert shared_with_trunk(wrapper.parameters) == set()
    model["head"].weight = model["T1"].weight
    assert shared_with_trunk(wrapper.parameters) == {id(model["T1"].weight)}


def test_freezing_is_read_at_each_call() -> None:
    wrapper = brain().wrapper()
    bias = wrapper.named_parameters("rsfMRI")[f"{RSFMRI}.bias"]
    bias.requires_grad_(False)
    assert connected(wrapper, ["T1", "dMRI"]) == {f"{RSFMRI}.weight"}
    bias.requires_grad_(True)
    assert len(connected(wrapper, ["T1", "dMRI"])) == 2


def _compiled(model: nn.Module) -> nn.Module:
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    return compiled


WRAPPINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "torch.compile": _compiled,
    "checkpointing": checkpoint_wrapper,
    "all": lambda model: DistributedDataParallel(checkpoint_wrapper(model)),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_one_map_serves_the_bare_and_the_wrapped_model(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    case = brain()
    expected = {f"{RSFMRI}.{kind}" for kind in ("weight", "bias")}
    bare = case.wrapper()
    wrapped = DummyLossWrapper(wrap(case.model), case.spec)
    assert connected(wrapped, ["T1", "dMRI"]) == expected
    assert connected(bare, ["T1", "dMRI"]) == expected
    by_glob = DummyLossWrapper(wrap(Brain()), {"rsfMRI": "vision_tower.rsf*", "T1": T1})
    assert connected(by_glob, ["T1"]) == expected


def _tower(model: Brain) -> Any:
    return model.vision_tower["T1_patch_embed"]


def _replace(wrap: Callable[[Any], nn.Module]) -> Callable[[Brain], object]:
    """A change that puts a wrapped tower in place of the tower."""
    return lambda model: model.vision_tower.update({"T1_patch_embed": wrap(_tower(model))})


def _old_weight_norm(model: Brain) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(_tower(model))


WEIGHT = {f"{T1}.weight"}
ORIGINAL = f"{T1}.parametrizations.weight.original"
CHANGES: dict[str, tuple[Callable[[Brain], object], set[str]]] = {
    "checkpoint_wrapper": (_replace(checkpoint_wrapper), WEIGHT),
    "torch.compile": (_replace(_compiled), WEIGHT),
    "replaced parameter": (
        lambda model: setattr(_tower(model), "weight", nn.Parameter(torch.ones(4, 3))),
        WEIGHT,
    ),
    "load_state_dict(assign=True)": (
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        WEIGHT,
    ),
    "to another dtype": (lambda model: model.to(torch.float64), WEIGHT),
    "weight_norm": (
        lambda model: parametrizations.weight_norm(_tower(model)),
        {f"{ORIGINAL}0", f"{ORIGINAL}1"},
    ),
    "weight_norm before parametrizations": (_old_weight_norm, {f"{T1}.weight_g", f"{T1}.weight_v"}),
    "spectral_norm": (lambda model: parametrizations.spectral_norm(_tower(model)), {ORIGINAL}),
    "pruning": (
        lambda model: prune.random_unstructured(_tower(model), "weight", amount=0.5),
        {f"{T1}.weight_orig"},
    ),
    "fully_shard": (lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))), WEIGHT),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("spec", WAYS.values(), ids=WAYS.keys())
def test_a_parameter_is_found_after_the_model_changed(
    change: Callable[[Brain], object], expected: set[str], spec: Callable[[Brain], Any]
) -> None:
    """The wrapper is made first; the parameter, or what stands for it now, gets the dummy."""
    model = Brain()
    wrapper = DummyLossWrapper(model, {"T1": spec(model), "dMRI": "fusion"})
    change(model)
    assert {strip_wrappers(name) for name in wrapper.named_parameters("T1")} == expected
    assert connected(wrapper, ["dMRI"]) == expected


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES.keys())
def test_a_module_is_found_after_the_model_changed(
    change: Callable[[Brain], object], expected: set[str]
) -> None:
    """A module owns whatever is below its path, adapters included."""
    model = Brain()
    wrapper = DummyLossWrapper(model, {"T1": model.vision_tower["T1_patch_embed"]})
    change(model)
    names = {strip_wrappers(name) for name in wrapper.named_parameters("T1")}
    assert expected < names
    assert all(name.startswith(T1) for name in names)


def test_a_path_that_is_gone_is_an_error() -> None:
    """Never silence: the parameters would stop getting gradients."""
    model = Brain()
    wrapper = DummyLossWrapper(model, {"T1": T1, "dMRI": "fusion"})
    del model.vision_tower["T1_patch_embed"]
    with pytest.raises(ParameterMapError, match="any more"):
        wrapper.dummy("dMRI")


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("module.enc.weight", "enc.weight"),
        ("enc._checkpoint_wrapped_module.weight", "enc.weight"),
        ("_orig_mod.module.enc._fsdp_wrapped_module.weight", "enc.weight"),
        ("base_model.model.model.enc.weight", "model.enc.weight"),
        ("model.base_model.enc.weight", "model.base_model.enc.weight"),
        ("modules.weight", "modules.weight"),
    ],
)
def test_strip_wrappers(name: str, bare: str) -> None:
    assert strip_wrappers(name) == bare


def test_a_place_without_a_module_is_passed_over() -> None:
    """As `downsample` of a ResNet block is None."""
    model = nn.ModuleDict({"T1": nn.Linear(2, 2)})
    model["T1"].register_module("extra", None)
    wrapper = DummyLossWrapper(model, {"T1": "T1"})
    assert list(wrapper.named_parameters("T1")) == ["T1.weight", "T1.bias"]


def test_a_parametrization_may_have_modules_without_a_bias() -> None:
    model = nn.ModuleDict({"T1": nn.Linear(2, 2), "dMRI": nn.Linear(2, 2)})
    register_parametrization(model["T1"], "weight", nn.Linear(2, 2, bias=False))
    wrapper = DummyLossWrapper(model, {"T1": "T1.weight", "dMRI": "dMRI"})
    owned = list(wrapper.named_parameters("T1"))
    assert owned == [f"T1.parametrizations.weight.{name}" for name in ("original", "0.weight")]


class Model(nn.ModuleDict):
    """Counts how often all its modules are walked."""

    num_walks = 0

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self.num_walks += 1
        return super().named_modules(*args, **kwargs)


class Name(str):
    """Counts how often names are compared."""

    num_comparisons = 0

    def __eq__(self, other: object) -> bool:
        Name.num_comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def large(spec: Callable[[Model, str], Any], num_keys: int) -> DummyLossWrapper:
    names = [f"m{number}" for number in range(num_keys)]
    model = Model({name: nn.Linear(1, 1) for name in names})
    return DummyLossWrapper(model, {Name(name): spec(model, name) for name in names})


LARGE_SPECS: dict[str, Callable[[Model, str], Any]] = {
    "path": lambda _, name: name,
    "glob": lambda _, name: f"{name}.b*s",
    "module": lambda model, name: model[name],
    "parameter": lambda model, name: model[name].weight,
}


@pytest.mark.parametrize("spec", LARGE_SPECS.values(), ids=LARGE_SPECS.keys())
def test_a_large_map_walks_its_model_no_more_often_than_a_small_one(
    spec: Callable[[Model, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = Mock(side_effect=fnmatchcase)
    monkeypatch.setattr(parameter_map, "fnmatchcase", compare)
    small, big = large(spec, 2), large(spec, 90)
    assert small.parameters.model.num_walks == big.parameters.model.num_walks
    assert compare.call_count <= 4 * 92


MANY = [Name(f"m{number}") for number in range(200)]
LARGE_USES: dict[str, Callable[[DummyLossWrapper], object]] = {
    "constructor": lambda _: large(LARGE_SPECS["path"], 200),
    "total": lambda wrapper: wrapper.total(torch.tensor(1.0), MANY),
    "names": lambda wrapper: wrapper.reader.read([[name] for name in MANY]),
    "mapping": lambda wrapper: wrapper.reader.read(dict.fromkeys(MANY, True)),
    "flags": lambda wrapper: wrapper.reader.read({"modality": dict.fromkeys(MANY, True)}),
    "captions": lambda wrapper: wrapper(lambda *_: torch.tensor(1.0))([Name("cap")] * 200, MANY),
    "as_dict": lambda wrapper: wrapper.last and wrapper.last.as_dict(),
    "gradient_norms": lambda wrapper: gradient_norms(wrapper, active=MANY[:100]),
    "constant keys": lambda wrapper: gradient_norms(wrapper, active=MANY[:100], label=False),
}


@pytest.mark.parametrize("use", LARGE_USES.values(), ids=LARGE_USES.keys())
def test_names_of_a_large_map_are_looked_up_and_not_searched_for(
    use: Callable[[DummyLossWrapper], object],
) -> None:
    """Each name is compared with some others, not with all."""
    wrapper = large(LARGE_SPECS["path"], 200)
    # The wrapper has plain strings, which count nothing.
    wrapper.parameters.paths = {Name(key): paths for key, paths in wrapper.parameters.paths.items()}
    wrapper.parameters.modalities = tuple(MANY)
    wrapper.reader = BatchReader(MANY)
    wrapper.total(torch.tensor(1.0), MANY)
    Name.num_comparisons = 0
    use(wrapper)
    assert Name.num_comparisons < 20 * len(MANY)
