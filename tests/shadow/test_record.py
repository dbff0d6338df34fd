"""One record is made of several forward passes, of this rank and of others."""

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from modaldummy import (
    DummyLossWrapper,
    RankDisagreementError,
    RecordError,
    UnsupportedEngineError,
    shadow_inactive,
)
from tests.fake_ranks import pretend
from tests.preflight.models import Engine, partition

X = torch.ones(2, 3)
NAMES = ("a", "b", "c")
PATHS = {name: f"towers.{name}" for name in NAMES}


class InOrderOfTheBatch(nn.Module):
    """Calls its towers in the order of the keywords."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers: Any = nn.ModuleDict({name: nn.Linear(3, 4) for name in NAMES})
        self.trunk = nn.Linear(4, 2)
        self.options = options

    def forward(self, **batch: Tensor) -> Tensor:
        hidden = torch.zeros(2, 4)
        for name, data in batch.items():
            hidden = hidden + self.run(self.towers[name], data)
        return self.trunk(hidden).square().mean()  # type: ignore[no-any-return]

    def run(self, tower: nn.Module, data: Tensor) -> Tensor:
        return tower(data)  # type: ignore[no-any-return]


def batch(names: str) -> dict[str, Tensor]:
    return dict.fromkeys(names, X)


def called(model: InOrderOfTheBatch) -> list[str]:
    """The towers that a forward pass without any modality calls."""
    names: list[str] = []
    handles = [
        tower.register_forward_hook(lambda *_, name=name: names.append(name))
        for name, tower in model.towers.items()
    ]
    model()
    for handle in handles:
        handle.remove()
    return names


@pytest.mark.parametrize(
    ("examples", "order"),
    [
        ("abc", "abc"),
        ("cba", "cba"),
        ("c b a", "abc"),  # none says anything about the order, so the map does
        ("ca b", "bca"),
        ("cb ba", "cba"),
        ("a cb ca", "cab"),
    ],
)
def test_towers_run_in_an_order_that_fits_all_examples(examples: str, order: str) -> None:
    model = InOrderOfTheBatch()
    wrapper = DummyLossWrapper(model, PATHS)
    shadow_inactive(wrapper, model, examples=map(batch, examples.split()))
    assert called(model) == list(order)


@pytest.mark.parametrize("examples", ["ab ba c", "ab bc ca"])
def test_towers_in_different_orders_are_refused(examples: str) -> None:
    model = InOrderOfTheBatch()
    wrapper = DummyLossWrapper(model, PATHS)
    with pytest.raises(RecordError, match=r"in different orders: a Linear.*such as that of its ke"):
        shadow_inactive(wrapper, model, examples=map(batch, examples.split()))


def test_towers_in_the_order_of_the_batch_are_refused_in_forward() -> None:
    model = InOrderOfTheBatch()
    shadow_inactive(DummyLossWrapper(model, PATHS), model, examples=[batch("abc")])
    with pytest.raises(RecordError, match=r"called 2 times.*order that does not depend on the b"):
        model(**batch("ba"))


def test_a_tower_in_two_ways_is_refused() -> None:
    class SometimesCheckpointed(InOrderOfTheBatch):
        def run(self, tower: nn.Module, data: Tensor) -> Tensor:
            if data is X:
                return super().run(tower, data)
            return checkpoint(tower, data, use_reentrant=False)  # type: ignore[no-any-return]

    model = SometimesCheckpointed()
    examples = [batch("abc"), {"a": X.clone()}]
    with pytest.raises(RecordError, match="was recorded in two ways"):
        shadow_inactive(DummyLossWrapper(model, PATHS), model, examples=examples)


# --- several ranks ----------------------------------------------------------------------------


class OtherRank:
    """A second rank, which has recorded other forward passes of the same model."""

    sent: Any = ()

    def all_gather(self, received: list[Tensor], sent: Tensor, group: object) -> None:
        received[0].copy_(sent)
        received[1].copy_(sent if self.sent == () else 255 - sent)

    def all_gather_object(self, values: list[Any], value: Any, group: object) -> None:
        values[:] = [pickle.loads(pickle.dumps(own)) for own in (value, self.sent)]


@pytest.fixture
def other(process_group: None, monkeypatch: pytest.MonkeyPatch) -> OtherRank:
    rank = OtherRank()
    pretend(monkeypatch, 2, rank.all_gather)
    monkeypatch.setattr(dist, "all_gather_object", rank.all_gather_object)
    return rank


def record_of_another_rank(other: OtherRank, examples: str) -> None:
    """Lets the other rank send what it has recorded in these examples."""
    model = InOrderOfTheBatch()
    handle = shadow_inactive(DummyLossWrapper(model, PATHS), model)
    with handle.record():
        for names in examples.split():
            model(**batch(names))
    name_of = {module: name for name, module in model.named_modules()}
    other.sent = [[call.renamed(name_of) for call in own] for own in handle._shadow._passes]


def test_ranks_may_record_different_examples(other: OtherRank) -> None:
    record_of_another_rank(other, "ba")
    model = InOrderOfTheBatch()
    wrapper = DummyLossWrapper(model, PATHS)
    handle = shadow_inactive(wrapper, model, examples=[batch("c")])
    model.double()  # the arguments that the other rank has sent follow the towers
    model.trunk.float()
    model.towers["c"].float()
    names = []
    for name, tower in model.towers.items():
        tower.register_forward_hook(lambda *_, name=name: names.append(name))
    total = wrapper.total(model(**batch("c")), "c")
    assert names == ["b", "a", "c"]
    assert handle.shadowed == ("a", "b")
    total.backward()
    gradient: Any = model.towers["a"].weight.grad
    assert gradient.unique().tolist() == [pytest.approx(1e-7)]
    assert gradient.dtype is torch.float64


def test_ranks_without_a_record_of_all_modalities_are_refused(other: OtherRank) -> None:
    model = InOrderOfTheBatch()
    shadow_inactive(DummyLossWrapper(model, PATHS), model, examples=[batch("ac")])
    with pytest.raises(RecordError, match=r"no call of a tower of b\. Record a batch"):
        model(**batch("a"))


class Applies(nn.Linear):
    def forward(self, data: Tensor, function: Any) -> Tensor:  # type: ignore[override]
        output: Tensor = function(super().forward(data))
        return output


def test_an_argument_that_cannot_be_sent_is_named(other: OtherRank) -> None:
    class WithFunction(InOrderOfTheBatch):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleDict({name: Applies(3, 4) for name in NAMES})

        def run(self, tower: nn.Module, data: Tensor) -> Tensor:
            return tower(data, lambda output: output)  # type: ignore[no-any-return]

    model = WithFunction()
    shadow_inactive(DummyLossWrapper(model, PATHS), model, examples=[batch("abc")])
    other.sent = "something else"
    with pytest.raises(UnsupportedEngineError, match=r"sent to other ranks: Can't pickle lo"):
        model(**batch("a"))


def test_a_rank_that_does_not_send_its_record_in_time_is_named(
    other: OtherRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, group: object) -> None:
        raise RuntimeError("Timed out")

    model = InOrderOfTheBatch()
    shadow_inactive(DummyLossWrapper(model, PATHS), model, examples=[batch("abc")])
    other.sent = "something else"
    monkeypatch.setattr(dist, "all_gather_object", fail)
    with pytest.raises(RankDisagreementError, match="Not all ranks called the m"):
        model(**batch("a"))


# --- parameters that no call reaches ----------------------------------------------------------


class Tokens(InOrderOfTheBatch):
    """Parameters that are used and not called: one of the root, two in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(2))
        self.listed = nn.ParameterList([nn.Parameter(torch.ones(2))])
        self.named = nn.ParameterDict({"b": nn.Parameter(torch.ones(2))})

    def forward(self, **batch: Tensor) -> Tensor:
        total = super().forward(**batch)
        for name, token in (("a", self.token), ("b", self.named["b"]), ("c", self.listed[0])):
            if name in batch:
                total = total + token.sum()
        return total


TOKEN_PATHS: dict[Any, Any] = {
    "a": ["towers.a", "token"],
    "b": ["towers.b", "named.b"],
    "c": ["listed"],
}


def test_parameters_without_a_call_get_their_dummy_from_the_total() -> None:
    model = Tokens()
    wrapper = DummyLossWrapper(model, TOKEN_PATHS)
    handle = shadow_inactive(wrapper, model, examples=[batch("ab")])
    wrapper.total(model(**batch("b")), "b").backward()
    assert handle.shadowed == ("a",)
    parameters: Any = model.token, model.listed[0], model.towers["a"].weight
    for parameter in parameters:
        assert parameter.grad is not None
        assert parameter.grad.unique().tolist() == [pytest.approx(1e-7)]
    assert wrapper.last is not None
    assert wrapper.last.num_params == 2  # the token and the list; the tower has its shadow


def test_they_are_refused_where_they_are_sharded(process_group: None) -> None:
    model = Tokens()
    fully_shard(model, reshard_after_forward=True)
    wrapper = DummyLossWrapper(model, TOKEN_PATHS)
    text = r"No recorded call of a tower reaches listed\.0, named\.b, token\. FSDP2 has resharded"
    with pytest.raises(UnsupportedEngineError, match=text):
        shadow_inactive(wrapper, model, examples=[batch("ab")])


# --- the order of gradients -------------------------------------------------------------------


class Recurrent(InOrderOfTheBatch):
    """Backward of an LSTM gives four parameters their gradients at once."""

    def __init__(self, tower: Any = nn.LSTM) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({name: tower(3, 4) for name in NAMES})

    def run(self, tower: nn.Module, data: Tensor) -> Tensor:
        output = tower(data)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


class Normed(nn.Sequential):
    """Backward of a norm gives two parameters their gradients at once, and its input too."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(nn.LayerNorm(num_inputs), nn.Linear(num_inputs, num_outputs))


@pytest.mark.parametrize(
    ("engine", "refused"),
    [
        (lambda model: model, False),
        (lambda model: Engine(model, 1), False),
        (lambda model: Engine(model, 1, overlap=True), True),
        (lambda model: Engine(model, 2), True),
        (lambda model: Engine(model, 3), True),
    ],
    ids=["no engine", "ZeRO-1", "ZeRO-1, overlapping", "ZeRO-2", "ZeRO-3"],
)
def test_gradients_without_an_order_are_refused_where_it_matters(
    engine: Callable[[nn.Module], nn.Module], refused: bool
) -> None:
    model = engine(Recurrent())
    wrapper = DummyLossWrapper(model, PATHS)
    with (
        pytest.raises(UnsupportedEngineError, match="LSTM module, a tower, gives three or more")
        if refused
        else nullcontext()
    ):
        shadow_inactive(wrapper, model, examples=[batch("abc")])


def test_a_compiled_tower_is_refused_there_too() -> None:
    model = InOrderOfTheBatch()
    model.towers["b"].compile(backend="aot_eager")
    engine = Engine(model, 2)
    wrapper = DummyLossWrapper(engine, PATHS)
    with pytest.raises(UnsupportedEngineError, match="or of a compiled module"):
        shadow_inactive(wrapper, engine, examples=[batch("abc")])


def test_parameters_that_zero_has_partitioned_need_the_engine() -> None:
    model = Recurrent()
    partition(model, "_hp_mapping")
    with pytest.raises(UnsupportedEngineError, match="pass the engine as `model`"):
        shadow_inactive(DummyLossWrapper(model, PATHS), model, examples=[batch("abc")])


@pytest.mark.parametrize("tower", [nn.Linear, Normed])
def test_gradients_of_other_towers_arrive_in_one_order(tower: Any) -> None:
    """Whichever towers are shadowed; inputs that need a gradient are no leaves in a shadow."""
    orders = set()
    for count in range(5):
        for names in combinations("abcd", count):
            model = Recurrent(tower)
            model.towers["d"] = tower(3, 4)
            wrapper = DummyLossWrapper(model, PATHS | {"d": "towers.d"})
            data = nn.Linear(3, 3)(X)
            shadow_inactive(wrapper, model, examples=[dict.fromkeys("abcd", data)])
            order: list[str] = []
            for name, parameter in model.named_parameters():
                parameter.register_hook(lambda _, add=order.append, name=name: add(name))
            wrapper.total(model(**dict.fromkeys(names, data)), list(names)).backward()
            orders.add(tuple(order))
    assert len(orders) == 1
