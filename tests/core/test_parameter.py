"""Parameters that are not plain dense tensors: they get a gradient, or are refused by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.two_tensor import TwoTensor

from modaldummy import DummyLossWrapper, ParameterMapError, UnsupportedEngineError
from tests.asserts import assert_connected, assert_same_bits, last_report
from tests.zoo import Pair, holder

SCALES = [1e-7, 0.0, None]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("scale", [1e-7, 0.0])
def test_a_sparse_table_gets_an_empty_sparse_gradient(
    kind: type[nn.Embedding | nn.EmbeddingBag], scale: float
) -> None:
    """Connected, with nothing for SparseAdam to move; the value leaves the table out."""
    table = kind(5, 3, sparse=True)
    model = Pair(table)
    wrapper = model.wrapper(scale)
    optimizer = torch.optim.SparseAdam(table.parameters())
    before = table.weight.detach().clone()
    for _ in range(2):
        model.step(wrapper)
        gradient = table.weight.grad
        assert gradient is not None
        assert gradient.is_sparse
        assert gradient.shape == (5, 3)
        assert gradient._nnz() == 0
        optimizer.step()
    assert_same_bits(table.weight.detach(), before, "table")
    assert last_report(wrapper).uncapped == 0
    assert last_report(wrapper).num_elements == 0  # no element of it gets a gradient


def test_a_sparse_table_with_real_gradients_keeps_them() -> None:
    """Accumulation: an empty gradient adds no row."""
    table = nn.Embedding(5, 3, sparse=True)
    model = Pair(table)
    table(torch.tensor([1, 3])).sum().backward()
    model.step(model.wrapper())
    assert table.weight.grad is not None
    assert table.weight.grad.coalesce().indices().tolist() == [[1, 3]]


@pytest.mark.parametrize("dense_first", [True, False])
def test_a_sparse_table_that_a_dense_layer_shares_gets_a_dense_gradient(dense_first: bool) -> None:
    """The dense layer would make its gradients dense anyway."""
    table, head = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 5, bias=False)
    head.weight = table.weight
    model = Pair(nn.Sequential(head, table) if dense_first else nn.Sequential(table, head))
    model.step(model.wrapper())
    assert_connected({"table": table.weight})


class Projected(nn.Embedding):
    """A table with a dense parameter of its own."""

    def __init__(self) -> None:
        super().__init__(5, 3, sparse=True)
        self.projection = nn.Parameter(torch.ones(3, 3))


def test_only_the_table_of_a_sparse_embedding_is_sparse() -> None:
    model = Pair(Projected())
    model.step(model.wrapper())
    assert model.b.weight.grad.is_sparse
    assert_connected({"projection": model.b.projection})


class Labelled(Tensor):
    """A subclass that behaves as a tensor does."""


@pytest.mark.parametrize("scale", SCALES)
def test_a_relabelled_parameter_does_not_relabel_the_loss(scale: float | None) -> None:
    model = Pair(holder(weight=torch.ones(2, 2).as_subclass(Labelled)))
    wrapper = model.wrapper(scale)
    total = model.step(wrapper)
    assert type(model.b.weight) is Labelled
    assert type(total) is Tensor
    assert type(last_report(wrapper).uncapped) is Tensor
    if scale:
        assert_connected({"b": model.b.weight})


def test_a_wrapper_subclass_is_summed_by_its_own_operators() -> None:
    """A tensor made of two: the sum is too, and so is the gradient."""
    model = Pair(holder(weight=TwoTensor(torch.ones(2, 2), torch.full((2, 2), 2.0))))
    wrapper = model.wrapper()
    model.step(wrapper)
    uncapped = last_report(wrapper).uncapped
    assert isinstance(uncapped, TwoTensor)
    assert [uncapped.a.item(), uncapped.b.item()] == pytest.approx([4e-7, 8e-7])
    assert model.b.weight.grad is not None
    assert torch.count_nonzero(model.b.weight.grad) == 4


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("towers", [False, True], ids=["root", "towers"])
@pytest.mark.parametrize("reshard", [False, True], ids=["kept", "resharded"])
def test_a_model_that_is_sharded_later_keeps_its_wrapper(towers: bool, reshard: bool) -> None:
    """`fully_shard` swaps the parameters; plain or sharded, they are found when `total` runs."""
    model = Pair(nn.Linear(3, 2))
    wrapper = model.wrapper()
    mesh = init_device_mesh("cpu", (1,))
    for module in ([model.a, model.b] if towers else []) + [model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    for _ in range(2):
        model.zero_grad()
        model.step(wrapper)
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(isinstance(gradient, DTensor) for gradient in gradients)
        local = [g.to_local() for g in gradients if isinstance(g, DTensor)]
        assert all(gradient.all() for gradient in local)
        assert_same_bits(local[-1], torch.full((2,), 1e-7), "bias")


@pytest.mark.parametrize("scale", SCALES)
def test_a_parameter_on_meta_is_refused_only_if_it_would_be_read(scale: float | None) -> None:
    model = Pair(nn.Linear(3, 2, device="meta"))
    if scale:
        with pytest.raises(ParameterMapError, match=r"'b.weight' .* meta .* on cpu. Load"):
            model.step(model.wrapper(scale))
    model.step(model.wrapper(scale, gradient_only=True))
    gradient = model.b.weight.grad
    assert (gradient is None) == (scale is None)
    assert gradient is None or (gradient.is_meta and gradient.shape == (2, 3))


def test_a_dummy_alone_may_live_on_meta() -> None:
    model = Pair(nn.Linear(3, 2, device="meta"))
    assert model.wrapper().dummy("a").is_meta
    mixed = Pair(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    with pytest.raises(ParameterMapError, match=r"'b.1.weight' .* meta device"):
        mixed.wrapper().dummy("a")


@pytest.mark.parametrize("scale", SCALES)
def test_a_parameter_that_zero_3_has_emptied_is_refused(scale: float | None) -> None:
    """DeepSpeed notes on it how many elements it has once it is gathered."""
    model = Pair(nn.Linear(3, 2))
    wrapper = model.wrapper(scale)
    weight = model.b.weight
    weight.ds_numel = weight.numel()
    model.step(wrapper)  # gathered
    weight.grad, weight.data = None, torch.empty(0)
    wrapper.total(model(), ["a", "b"])
    with pytest.raises(UnsupportedEngineError, match=r"'b\.weight' .*GatheredParameters"):
        wrapper.total(model(), "a")
    del weight.ds_numel
    model.step(wrapper)  # one that never had any elements


def test_a_lazy_parameter_needs_a_shape_once_it_is_inactive() -> None:
    """A forward pass gives it one. What is frozen, or in an active key too, needs none."""
    model = Pair(nn.LazyLinear(3))
    wrapper = model.wrapper()
    wrapper.total(model(), ["a", "b"])
    for trainable in (False, True):
        for parameter in model.b.parameters():
            parameter.requires_grad = trainable
        if not trainable:
            wrapper.total(model(), "a")
    with pytest.raises(ParameterMapError, match=r"'b'\]`: the parameter 'b.weight' of a lazy mod"):
        wrapper.total(model(), "a")
    both = DummyLossWrapper(model, {"a": ["a", "b"], "b": "b"})
    real = model()
    assert both.total(real, "a") is real
    model.b(torch.ones(1, 2))
    model.step(wrapper)
    assert_connected({"weight": model.b.weight, "bias": model.b.bias})


NARROW = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_float8_is_refused_when_the_wrapper_is_made(dtype: torch.dtype) -> None:
    """And, frozen, it is let through until someone unfreezes it."""
    model = Pair(holder(weight=torch.ones(2, 2).to(dtype)))
    with pytest.raises(ParameterMapError, match=rf"\['b'\]`: .*'b.weight' .*{dtype}.*bfloat16"):
        model.wrapper()
    model.b.weight.requires_grad_(False)
    wrapper = model.wrapper()
    model.step(wrapper)
    model.b.weight.requires_grad_(True)
    with pytest.raises(ParameterMapError, match=r"'b.weight'"):
        model.step(wrapper)


def test_gradients_are_made_where_their_parameter_is() -> None:
    on_meta = [nn.Linear(2, 2, device="meta"), nn.Embedding(5, 3, sparse=True, device="meta")]
    model = Pair(nn.Sequential(nn.Linear(2, 2), *on_meta))
    model.step(model.wrapper(gradient_only=True))
    assert_connected({"cpu": model.b[0].weight})
    assert all(model.b[i].weight.grad.is_meta for i in (1, 2))
    assert model.b[2].weight.grad.is_sparse


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_may_lie_on_several_devices(device: str) -> None:
    """The value comes to the loss, the gradient to each parameter."""
    model = Pair(
        nn.Sequential(holder(weight=torch.ones(2)), holder(weight=torch.ones(3, device="cuda")))
    )
    model.a.to(device)
    wrapper = model.wrapper()
    loss = model.a(torch.ones(2, device=device)).square().sum()
    total = wrapper.total(loss, "a")
    total.backward()
    assert total.device == loss.device
    assert last_report(wrapper).uncapped.item() == pytest.approx(5e-7)
    assert_connected(dict(model.b.named_parameters()))


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.ones(4, 3).t(),
    "channels_last": lambda: torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "contiguous": lambda: torch.ones(2, 3),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_gradient_has_the_strides_of_its_parameter(make: Callable[[], Tensor]) -> None:
    """Autograd's layout contract, which fused optimizers rely on."""
    model = Pair(holder(weight=make()))
    for _ in range(2):
        model.step(model.wrapper())
        assert model.b.weight.grad.stride() == model.b.weight.stride()
