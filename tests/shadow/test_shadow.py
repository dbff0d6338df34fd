"""What a shadow does in one process: the right gradients, and no trace."""

import copy
import gc
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from modaldummy import (
    DummyLossWrapper,
    RecordError,
    ShadowHandle,
    UnsupportedEngineError,
    diagnose,
    gradient_norms,
    preflight,
    shadow_inactive,
)
from tests.distributed.engines import Checkpointed, Exact
from tests.distributed.oracle import MAP, NAMES, Model, batch_of, held_against_truth, loss_of
from tests.distributed.schedules import schedules

X = torch.ones(2, 3)
MAPS = {"a": "a", "b": "b"}


class Shadowed(Exact):
    """A model with a shadow, and nothing around it."""

    def __init__(self, model: Model, scale: float | None = 1e-7) -> None:
        self.model: Any = model.double()
        super().__init__(self.model, self.model, DummyLossWrapper(self.model, MAP, scale))
        self.handle = shadow_inactive(self.wrapper, self.model)
        with self.handle.record():
            self.model(batch_of(NAMES, 9, dtype=self.dtype))

    def loss(self, *active: str) -> Tensor:
        return loss_of(self.model(batch_of(active, 0, dtype=self.dtype)))

    def total(self, *active: str) -> Tensor:
        return self.wrapper.total(self.loss(*active), active)


MODELS: dict[str, Callable[[], Model]] = {
    "plain": Model,
    "checkpoints": lambda: Checkpointed(False),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@given(schedules(1, max_micros=2), st.sampled_from((1e-7, 0.0, None)))
def test_gradients_are_those_of_a_model_without_a_shadow(
    model: Callable[[], Model], schedule: Any, scale: float | None
) -> None:
    found = held_against_truth(0, lambda scale: Shadowed(model(), scale), scale, schedule)
    assert found.worst <= 1, found
    assert not found.missing


def keys(handle: ShadowHandle) -> list[Any]:
    return list(handle.shadowed)


def test_the_loss_stays_bit_for_bit_and_the_report_leaves_shadows_out() -> None:
    case = Shadowed(Model())
    real = case.loss("T1")
    assert torch.equal(case.wrapper.total(real, "T1"), real)
    assert keys(case.handle) == ["rsfMRI", "dMRI", ("T1", "dMRI")]
    report = case.wrapper.last
    assert report is not None
    assert (report.inactive, report.num_params) == (("rsfMRI", "dMRI"), 0)
    case.total(*NAMES).backward()
    assert keys(case.handle) == []


def test_norms_label_shadowed_parameters_inactive() -> None:
    case = Shadowed(Model())
    case.total("T1").backward()
    norms = gradient_norms(case.wrapper)
    assert norms["grad/[inactive]/towers.dMRI.bias"] == pytest.approx(2e-7)


@pytest.mark.parametrize("scale", [1e-7, 0.0, None])
def test_the_doctor_finds_nothing_in_the_log_of_a_healthy_run(scale: float | None) -> None:
    case = Shadowed(Model(), scale)
    choices = random.Random(0)
    rows = []
    for step in range(50):
        active = [name for name in NAMES if choices.random() < 0.5]
        case.total(*active).backward()
        assert case.wrapper.last is not None
        rows.append({"step": step} | case.wrapper.last.as_dict() | gradient_norms(case.wrapper))
        case.step()
    assert diagnose(rows) == []


def test_each_backward_pass_through_a_loss_adds_one_dummy_gradient() -> None:
    case = Shadowed(Model())
    total = case.total("T1")
    for factor, expected in ((1.0, 1e-7), (2.0, 3e-7)):
        (factor * total).backward(retain_graph=True)
        gradient = case.model.towers["dMRI"].bias.grad
        assert gradient.unique().tolist() == [pytest.approx(expected)]


def test_several_forward_passes_before_one_backward() -> None:
    """Of one loss each parameter gets one dummy gradient, of several losses one each."""
    case = Shadowed(Model(), scale=0.5)
    losses = [case.loss("T1"), case.loss("T1")]
    case.wrapper.total(sum(losses), "T1").backward()  # type: ignore[arg-type]
    bias = case.model.towers["dMRI"].bias
    assert bias.grad.unique().tolist() == [0.5]
    case.model.zero_grad()
    (case.total("T1") + case.total("rsfMRI") / 4).backward()
    assert bias.grad.unique().tolist() == [0.625]


def test_a_pass_without_backward_leaves_no_hooks() -> None:
    case = Shadowed(Model())
    bias = case.model.towers["dMRI"].bias
    total = case.total("T1")
    assert bias._backward_hooks
    del total
    gc.collect()
    assert not bias._backward_hooks
    case.total("T1").backward()
    gc.collect()
    assert not bias._backward_hooks


def test_passes_without_a_loss_are_forgotten() -> None:
    """As in an evaluation that does not disable gradients."""
    case = Shadowed(Model())
    for _ in range(5):
        case.loss("T1")
    gc.collect()
    assert len(vars(case.wrapper.interceptor)["_shadowing"]) == 0


def test_a_loss_of_no_pass_leaves_towers_alone() -> None:
    """Outside of forward an engine may have only parts of their parameters."""
    case = Shadowed(Model())
    loss = torch.ones((), dtype=case.dtype, requires_grad=True)
    case.wrapper.total(loss, "T1").backward()
    assert all(parameter.grad is None for parameter in case.model.parameters())


def test_without_gradients_and_paused() -> None:
    case = Shadowed(Model())
    with torch.no_grad():
        case.loss("T1")
    assert keys(case.handle) == ["rsfMRI", "dMRI", ("T1", "dMRI")]
    case.total("rsfMRI").backward()
    with case.handle.paused():
        case.total("T1").backward()
    assert keys(case.handle) == []


def test_a_removed_shadow_leaves_the_model_as_it_was() -> None:
    case = Shadowed(Model())
    with case.handle:
        assert repr(case.handle) == "<ShadowHandle of Model, in effect>"
    for module in case.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    case.total("T1").backward()
    assert case.wrapper.last.num_params == 6  # type: ignore[union-attr]
    shadow_inactive(case.wrapper, case.model).remove()


class Traces(nn.Module):
    """A tower that changes its buffers, draws random numbers and works in place."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout()
        )
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, data: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.layers(data).mul_(1)  # type: ignore[no-any-return]


class TwoTowers(nn.Module):
    """A trunk that gets the sum of two towers by keyword, and returns a mapping with a loss."""

    def __init__(self, make: Callable[[], nn.Module] = Traces, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a: Any = make()
        self.b: Any = make()
        self.trunk: Any = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))
        self.options = options

    def append(self, name: str, module: nn.Module) -> "TwoTowers":
        self.add_module(name, module)
        return self

    def forward(self, a: Tensor | None = None, b: Tensor | None = None) -> dict[str, Tensor]:
        hidden = torch.zeros(2, 4)
        for name, data in (("a", a), ("b", b)):
            if data is not None:
                hidden = hidden + self.run(getattr(self, name), data)
        return {"hidden": hidden, "loss": self.run(self.trunk, hidden).square().mean()}

    def run(self, part: nn.Module, data: Tensor) -> Tensor:
        if not self.options:
            return part(data)  # type: ignore[no-any-return]
        return checkpoint(part, data.clone().requires_grad_(), **self.options)  # type: ignore[no-any-return]


def two_towers(model: Any = None, **options: Any) -> tuple[Any, DummyLossWrapper, ShadowHandle]:
    model = model or TwoTowers()
    wrapper = DummyLossWrapper(model, MAPS)
    examples = [{"a": X, "b": 2 * X}]
    return model, wrapper, shadow_inactive(wrapper, model, examples=examples, **options)


def test_no_trace_is_left() -> None:
    """Neither by the record nor by a shadow."""
    model = TwoTowers()
    before = copy.deepcopy(model.state_dict())
    identities = [id(buffer) for buffer in model.buffers()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    _, wrapper, _ = two_towers(model)
    assert torch.equal(torch.get_rng_state(), state)
    wrapper.total(model(a=X)["loss"], "a").backward()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (
            not name.startswith("a") or "weight" in name or "bias" in name
        )
    assert [id(buffer) for buffer in model.b.buffers()] == identities[4:]
    states = []
    for each in (model, TwoTowers()):
        torch.manual_seed(1)
        each(a=X)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_an_infinite_output_of_a_shadow_changes_nothing() -> None:
    model, wrapper, _ = two_towers(TwoTowers(lambda: nn.Linear(3, 4)))
    loss = model(a=X)["loss"]
    with torch.no_grad():
        model.b.weight.fill_(torch.inf)
    total = wrapper.total(model(a=X)["loss"], "a")
    assert torch.equal(total, loss)
    total.backward()
    assert torch.isfinite(model.a.weight.grad).all()
    assert model.b.bias.grad.unique().tolist() == [pytest.approx(1e-7)]


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(saved(model), weights_only=False),
    ],
    ids=["deep copy", "pickle", "saved"],
)
def test_a_copy_of_the_model_has_no_shadow(copied: Callable[[Any], Any]) -> None:
    model, wrapper, handle = two_towers(TwoTowers(lambda: nn.Linear(3, 4)))
    other = copied(model)
    other(a=X)["loss"].backward()
    assert other.b.weight.grad is None
    assert keys(handle) == []
    wrapper.total(model(a=X)["loss"], "a").backward()
    assert keys(handle) == ["b"]


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_tower_inside_a_checkpoint(use_reentrant: bool) -> None:
    class Inside(TwoTowers):
        def run(self, part: nn.Module, data: Tensor) -> Tensor:
            return part(data) if part is self.trunk else super().run(part, data)

    def linear() -> nn.Module:
        return nn.Linear(3, 4)

    model, wrapper, _ = two_towers(Inside(linear, use_reentrant=use_reentrant))
    other: Any = Inside(linear)
    wrapper.total(model(a=X)["loss"], "a").backward()
    other(a=X)["loss"].backward()
    assert torch.equal(model.a.weight.grad, other.a.weight.grad)
    assert model.b.weight.grad.unique().tolist() == [pytest.approx(1e-7)]


def test_a_frozen_trunk_gets_the_graph_that_it_has_on_other_ranks() -> None:
    """There, backward goes through it to the tower."""
    frozen: Any = TwoTowers(lambda: nn.Linear(3, 4))
    frozen.trunk.requires_grad_(False)
    frozen.a.requires_grad_(False)
    model, wrapper, _ = two_towers(frozen)
    total = wrapper.total(model(a=X)["loss"], "a")
    assert total.requires_grad
    total.backward()
    assert model.b.weight.grad.unique().tolist() == [pytest.approx(1e-7)]


class WithLoss(Model):
    """Computes its total in forward, as Lightning's `training_step` does inside of an engine."""

    wrapper: DummyLossWrapper

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.wrapper.total(loss_of(super().forward(batch)), [n for n in NAMES if n in batch])


def test_a_total_inside_of_forward_gives_dummy_gradients() -> None:
    model = WithLoss().double()
    model.wrapper = DummyLossWrapper(model, MAP)
    batch = batch_of(NAMES, 9, dtype=torch.float64)
    some = {name: batch[name] for name in ("text", "T1")}
    shadow_inactive(model.wrapper, model, examples=[(batch,), (some,)])
    report: Any = model.wrapper.last
    assert report.num_params == 0  # engines may have only a part of what is inactive
    model(some).backward()
    gradient: Any = model.get_parameter("towers.dMRI.bias").grad
    assert gradient.unique().tolist() == [pytest.approx(1e-7)]


class Video(nn.Module):
    """One tower for two kinds of input, after an embedding; the loss is all that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.embedding, self.trunk = (nn.Linear(3, 3) for _ in range(3))

    def forward(
        self, text: Tensor, image: Tensor | None = None, video: Tensor | None = None
    ) -> Any:
        hidden = self.embedding(text)
        for data in (image, video):
            if data is not None:
                hidden = hidden + self.visual(data)
        return self.trunk(hidden).square().mean()


@pytest.mark.parametrize("active", [[], ["image"], ["video"], ["image", "video"]])
def test_a_tower_of_two_keys_runs_twice(active: list[str]) -> None:
    model: Any = Video()
    wrapper = DummyLossWrapper(model, {"image": "visual", "video": "visual"})
    shadow_inactive(wrapper, model, examples=[(X, X, X)])
    calls: list[Tensor] = []
    model.visual.register_forward_hook(lambda *arguments: calls.append(arguments[-1]))
    total = wrapper.total(model(X, **dict.fromkeys(active, X)), active)
    assert len(calls) == 2
    total.backward()
    gradient = model.visual.weight.grad
    assert (gradient.unique().numel() == 1) == (not active)


class Factor(nn.Linear):
    """A tower with an argument that is not a tensor."""

    def forward(self, data: Tensor, factor: int) -> Tensor:  # type: ignore[override]
        return super().forward(data) * factor


class Last(nn.Module):
    """No module of the trunk takes what the loss depends on, and one tower runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Bilinear(3, 3, 2), Factor(3, 2)
        self.beside = nn.Identity()

    def forward(self, first: Any = None, last: Any = None) -> list[Tensor]:
        output = torch.zeros(2, 2)
        if first is not None:
            output = output + self.first(first, first)
        output = output + self.beside(torch.ones(2, 2))
        return [output if last is None else output + self.last(last, 2), torch.arange(3)]


@pytest.mark.parametrize("active", [[], ["first"], ["last"]])
def test_towers_without_a_trunk_are_tied_to_the_output(active: list[str]) -> None:
    """Each example records a part; the output of the model is then all that there is."""
    model = Last()
    wrapper = DummyLossWrapper(model, {"first": "first", "last": "last"})
    examples = [(X, X), (X,), (None, X)]
    shadow_inactive(wrapper, model, examples=examples)
    wrapper.total(model(**dict.fromkeys(active, X))[0].sum(), active).backward()
    for name, module in (("first", model.first), ("last", model.last)):
        assert module.weight.grad is not None
        assert (module.weight.grad.abs().max() < 1e-6) == (name not in active)


class Outputs(nn.Module):
    """The loss is made of the last output alone, and no module of the trunk follows the towers."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
        self.made = made

    def forward(self, a: Any = None, b: Any = None) -> Any:
        output = self.trunk(X)
        for tower, data in ((self.a, a), (self.b, b)):
            output = output if data is None else output + tower(data)
        return self.made(output)


@pytest.mark.parametrize(
    ("made", "loss_of"),
    [
        (lambda output: (output.detach() * 2, output), lambda outputs: outputs[1].mean()),
        (lambda output: (X, {"logits": output}), lambda outputs: outputs[1]["logits"].mean()),
        (lambda output: {"logits": output * 1, "loss": output.mean()}, lambda found: found["loss"]),
    ],
    ids=["tuple", "nested", "loss"],
)
def test_towers_are_tied_to_the_output_that_the_loss_is_made_of(made: Any, loss_of: Any) -> None:
    model = Outputs(made)
    wrapper = DummyLossWrapper(model, MAPS)
    shadow_inactive(wrapper, model, examples=[(X, X)])
    outputs = model(a=X)
    wrapper.total(loss_of(outputs), "a").backward()
    assert wrapper.last is not None
    assert wrapper.last.num_params == 0
    gradient: Any = model.b.weight.grad
    assert gradient.unique().tolist() == [pytest.approx(1e-7)]


@pytest.mark.parametrize(
    "examples",
    [
        [{"a": X, "b": X}],
        [{"b": X}, {"a": X, "b": X}],
        [{"a": X}, {"a": X, "b": X}],
        [{"a": X}, {"b": X}],
        [{"b": X}, {"a": X}, {"a": X, "b": X}],
    ],
    ids=str,
)
def test_towers_run_in_the_order_of_the_model(examples: Any) -> None:
    """Whichever of them are real, and in whatever order the examples have them."""
    model = TwoTowers(lambda: nn.Linear(3, 4))
    called: list[str] = []
    for name in "ab":
        module = getattr(model, name)
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    shadow_inactive(DummyLossWrapper(model, MAPS), model, examples=examples)
    for batch in ({}, {"a": X}, {"b": X}, {"a": X, "b": X}):
        called.clear()
        model(**batch)
        assert called == ["a", "b"]


def test_a_backward_pass_while_recording_is_ignored() -> None:
    case = Shadowed(Model())
    with case.handle.record():
        case.loss(*NAMES).backward()
    assert all(parameter.grad is None for parameter in case.model.parameters())


def test_a_new_record_replaces_the_old_one() -> None:
    case = Shadowed(Model())
    del_me = case.loss("T1")
    with case.handle.record():
        case.loss(*NAMES)
    hooks = len(case.model.trunk._forward_pre_hooks)
    case.total("T1").backward()
    assert (hooks, len(case.model.trunk._forward_pre_hooks)) == (0, 1)
    del del_me
    case.loss("T1")  # its graph is gone when the next loss comes
    case.total("T1").backward()
    assert case.model.towers["dMRI"].bias.grad.unique().tolist() == [pytest.approx(2e-7)]


@pytest.mark.usefixtures("process_group")
def test_preflight_is_silent_about_what_a_shadow_makes_right() -> None:
    model = Model()
    for tower in model.towers.values():
        fully_shard(tower)
    wrapper = DummyLossWrapper(model, MAP)
    assert [finding.code for finding in preflight(wrapper)] == ["MD104"]
    with shadow_inactive(wrapper, model).record():
        model(batch_of(NAMES, 9))
    assert preflight(wrapper) == []


# --- what is refused --------------------------------------------------------------------------


class Around(TwoTowers):
    """One checkpoint is around both towers and the trunk."""

    def forward(self, a: Tensor | None = None, b: Tensor | None = None) -> Any:
        return checkpoint(super().forward, a, b, use_reentrant=False)


class CheckpointsItself(nn.Module):
    """Runs all that it has inside a checkpoint."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, data: Tensor) -> Any:
        return checkpoint(self.inner, data, use_reentrant=False)


class Nested(TwoTowers):
    """The tower of one key is inside that of another."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))


class Unused(TwoTowers):
    """The loss does not depend on a tower."""

    def run(self, part: nn.Module, data: Tensor) -> Tensor:
        output = super().run(part, data)
        return output.detach() if part is self.b else output


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, Any, type[Exception], str]] = {
    "a modality that the examples lack": (
        TwoTowers,
        MAPS,
        [{"a": X}],
        RecordError,
        "no call of a tower of b. Record a batch",
    ),
    "no examples": (TwoTowers, MAPS, [], RecordError, "Record a forward pass first"),
    "a tower inside another": (
        Nested,
        {"a": "a", "b": ["b", "a.1"]},
        [{"a": X, "b": X}],
        UnsupportedEngineError,
        "a tower of b, runs inside a Sequential module",
    ),
    "a loss without a tower": (
        Unused,
        MAPS,
        [{"a": X, "b": X}],
        RecordError,
        "does not depend on a Traces module",
    ),
    "a reentrant checkpoint after the tower": (
        lambda: TwoTowers(lambda: nn.Linear(3, 4), use_reentrant=True),
        MAPS,
        [{"a": X, "b": X}],
        UnsupportedEngineError,
        "reentrant checkpoint. Pass `use_reentrant=False`",
    ),
    "batch norm inside a checkpoint": (
        lambda: TwoTowers(lambda: CheckpointsItself(Traces())),
        MAPS,
        [{"a": X, "b": X}],
        UnsupportedEngineError,
        "a BatchNorm1d module runs inside a checkpoint in a tower",
    ),
    "a checkpoint around a tower and what follows it": (
        lambda: Around(lambda: nn.Linear(3, 4)),
        MAPS,
        [{"a": X, "b": X}],
        UnsupportedEngineError,
        "One checkpoint contains a Sequential module and the tower a Linear",
    ),
    "batch norm over ranks": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(TwoTowers()),
        MAPS,
        [{"a": X, "b": X}],
        UnsupportedEngineError,
        "a SyncBatchNorm module in a tower averages over all ranks",
    ),
    "several devices": (
        lambda: TwoTowers(lambda: nn.Linear(3, 4)).append("unused", nn.Linear(3, 4, device="meta")),
        MAPS,
        [{"a": X, "b": X}],
        UnsupportedEngineError,
        "on several devices: cpu, meta",
    ),
    "one call for two keys": (
        Video,
        {"image": "visual", "video": "visual"},
        [(X, X)],
        RecordError,
        "the tower of image, video and was called 1 times",
    ),
}


@pytest.mark.parametrize(
    ("make", "paths", "examples", "kind", "text"), REFUSED.values(), ids=REFUSED
)
def test_records_that_are_refused(
    make: Callable[[], nn.Module], paths: Any, examples: Any, kind: type[Exception], text: str
) -> None:
    """The wrapper and the model are then as before."""
    model = make()
    wrapper = DummyLossWrapper(model, paths)
    with pytest.raises(kind, match=text):
        shadow_inactive(wrapper, model, examples=examples)
    assert not any(module._forward_hooks for module in model.modules())
    assert wrapper.interceptor is None


def test_a_forward_pass_that_does_not_fit_the_record() -> None:
    model: Any = Video()
    model.trunk = nn.Sequential(model.trunk, nn.Identity())
    wrapper = DummyLossWrapper(model, {"image": "visual"})
    shadow_inactive(wrapper, model, examples=[(X, X)])
    with pytest.raises(RecordError, match="is called 2 times in this forward pass and 1 times"):
        model(X, X, X)
    model.trunk = nn.Identity()
    with pytest.raises(RecordError, match="which was called in the record, is not in the model"):
        model(X)


def test_a_projector_that_the_map_forgot_is_named() -> None:
    class Projected(TwoTowers):
        def run(self, part: nn.Module, data: Tensor) -> Tensor:
            output = super().run(part, data)
            projector: Any = self.projector
            return projector(output) if part is self.b else output

    model = Projected(lambda: nn.Linear(3, 4)).append("projector", nn.Linear(4, 4))
    shadow_inactive(DummyLossWrapper(model, MAPS), model, examples=[{"a": X, "b": X}])
    with pytest.raises(RecordError, match=r"of a Linear module that follows.*add it to the key"):
        model(a=X)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda model: model.a.requires_grad_(False), "`weight` of a Linear module is new"),
        (
            lambda model: model.append("b", nn.Linear(3, 4)),
            "a Linear module, which was called in the",
        ),
        (lambda model: model.append("c", nn.Linear(3, 4)), "`weight` of a Linear module is new"),
        (lambda model: model.b.register_parameter("lora", nn.Parameter(X)), "`lora` of a Linear"),
        (nn.Module.eval, r"The record is of training mode\. Call `model\.train\(\)`"),
    ],
    ids=["frozen", "replaced", "added", "adapter", "evaluation"],
)
def test_a_model_that_has_changed_since_the_record(change: Any, text: str) -> None:
    model, _, handle = two_towers(TwoTowers(lambda: nn.Linear(3, 4)))
    change(model)
    with pytest.raises(RecordError, match=text):
        model(a=X)
    with handle.record():
        model(a=X, b=X)
    model(a=X)
    assert keys(handle) == ["b"]


def test_evaluation_without_gradients_fits_a_record_of_training() -> None:
    model, _, handle = two_towers(TwoTowers(lambda: nn.Linear(3, 4)))
    with torch.no_grad():
        model.eval()(a=X)
    assert keys(handle) == ["b"]


def test_a_forward_pass_without_a_record() -> None:
    model = Video()
    shadow_inactive(DummyLossWrapper(model, {"image": "visual"}), model)
    with pytest.raises(RecordError, match="Record a forward pass first"):
        model(X)


def test_one_shadow_for_each_wrapper_and_model() -> None:
    model, wrapper, handle = two_towers()
    for called in (model, nn.Sequential(model)):
        with pytest.raises(ValueError, match="shadow already"):
            shadow_inactive(wrapper, called)
    with pytest.raises(ValueError, match="shadow already"):
        shadow_inactive(DummyLossWrapper(model, MAPS), model)
    with handle.record():
        model(a=X, b=X)
        with pytest.raises(RecordError, match="inside another record"), handle.record():
            pass
    handle.remove()
    with pytest.raises(RecordError, match="was removed"), handle.record():
        pass
