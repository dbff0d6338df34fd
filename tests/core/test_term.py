"""The numerics of the dummy term: value, cap, gradient."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from modaldummy._core.graph import reached_nodes
from modaldummy._core.reduce import by_spec
from modaldummy._core.term import Term, connect, dummy_term, scalar_loss
from tests.asserts import assert_same_bits
from tests.strategies import DTYPES, FLOATS


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, dtype=dtype))


def term(*params: Tensor, scale: float | None = 1e-7, loss: float | Tensor | None = None) -> Term:
    loss = torch.tensor(loss) if isinstance(loss, float) else loss
    return dummy_term(params, scale, loss=loss, max_fraction=1e-4)


def test_value_is_scale_times_the_sum() -> None:
    assert term(ones(3, 2), ones(4), scale=0.5).value.item() == 5.0


def test_float16_sums_do_not_overflow() -> None:
    """70,000 ones are more than float16 can count."""
    assert term(ones(70_000, dtype=torch.float16), scale=1.0).value.item() == 70_000


def test_float64_parameters_are_summed_in_float64() -> None:
    value = term(nn.Parameter(torch.tensor([1.0, 1e-12], dtype=torch.float64)), scale=1.0).value
    assert value.item() == 1 + 1e-12


def test_a_float64_loss_is_held_against_a_float64_sum() -> None:
    """The dtype is the widest of parameters and loss, whether the parameters are read or not."""
    loss = torch.tensor(2.0, dtype=torch.float64)
    for read in (True, False):
        result = dummy_term([ones(2)], 1e-7, loss=loss, read_values=read)
        for tensor in (result.value, result.uncapped, result.loss, result.connected):
            assert tensor.dtype == torch.float64


@pytest.mark.parametrize("read", [True, False])
def test_everything_is_where_the_loss_is(read: bool) -> None:
    loss = torch.ones((), device="meta")
    result = dummy_term([ones(2)], 1e-7, loss=loss, read_values=read)
    for tensor in (result.value, result.uncapped, result.loss, result.connected):
        assert tensor.is_meta


def test_complex_parameters_count_by_their_real_part() -> None:
    """And receive a real gradient."""
    parameter = nn.Parameter(torch.tensor([1 + 5j, 2 - 3j]))
    result = term(parameter, scale=0.5)
    assert result.value.item() == 1.5
    result.connected.backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.5, 0.5]


def connect_one(parameter: Tensor, scale: float) -> Tensor:
    """A zero whose backward gives the parameter `scale * upstream`."""
    return connect(torch.zeros(()), scale, [parameter], by_spec([parameter]))


def test_many_parameters_make_one_node() -> None:
    """The graph does not grow with the number of parameters."""
    connected = term(*[ones(2) for _ in range(50)]).connected
    nodes = [node for node in reached_nodes([connected.grad_fn]) if not hasattr(node, "variable")]
    assert nodes == [connected.grad_fn]


CAPS: dict[str, tuple[float, float]] = {
    "room enough": (10.0, 1e-4),
    "capped": (0.5, 0.5e-4 * (1 - 2**-10)),
    "negative loss": (-0.5, 0.5e-4 * (1 - 2**-10)),
    "zero": (0.0, 0.0),
    "subnormal": (1e-40, 0.0),
    "infinite": (math.inf, 0.0),
    "negative infinite": (-math.inf, 0.0),
    "NaN": (math.nan, 0.0),
    "largest": (torch.finfo(torch.float32).max, 0.0),
}


@pytest.mark.parametrize(("real", "expected"), CAPS.values(), ids=CAPS.keys())
@pytest.mark.parametrize("sign", [1, -1])
def test_cap(real: float, expected: float, sign: int) -> None:
    """The value is clipped to its fraction of the loss; the gradient does not notice."""
    parameter = nn.Parameter(sign * torch.ones(1000))
    result = term(parameter, loss=real)
    assert result.value.item() == pytest.approx(sign * expected, rel=1e-6, abs=0)
    assert result.uncapped.item() == pytest.approx(sign * 1e-4, rel=1e-6)
    result.connected.backward()
    assert_same_bits(parameter.grad, torch.full((1000,), 1e-7), "straight-through")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("max_fraction", [1e-4, None])
def test_the_largest_finite_loss_stays_finite(
    dtype: torch.dtype, max_fraction: float | None
) -> None:
    """Whatever the loss, the largest sum does not carry it over the edge."""
    info = torch.finfo(dtype)
    widest = torch.float64 if dtype == torch.float64 else torch.float32
    huge = nn.Parameter(torch.tensor(torch.finfo(widest).max, dtype=torch.float64))
    near = [info.max * (1 - factor * info.eps) for factor in (0, 1, 2, 3, 10)]
    for real in [*near, 0.999 * info.max, info.eps * 1.5 * info.max, *map(float, range(200))]:
        loss = torch.tensor(real, dtype=dtype)
        spread = torch.tensor([real, 0.0, -real, 0.0], dtype=dtype)
        for losses in (loss, -loss, spread, spread[:2]):
            for scale in (1.0, -1.0):
                params = [nn.Parameter(huge.detach() * scale)]
                result = dummy_term(params, 1.0, loss=losses, max_fraction=max_fraction)
                assert (losses + result.connected.to(dtype)).isfinite().all(), real


LOSSES = [1.0, 2.0, -3.0, 0.0, 1e-3, math.inf, -math.inf, math.nan, 2**-24, 2**-14, 65504.0]
LOSS_DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.uint16, torch.bool)


@pytest.mark.parametrize("dtype", LOSS_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0,)], ids=str)
@pytest.mark.parametrize("sum_of_parameters", [1e6, -1e6, 1e-6, math.inf, math.nan])
def test_the_bound_holds_for_losses_of_every_kind(
    dtype: torch.dtype, shape: tuple[int, ...], sum_of_parameters: float
) -> None:
    """A finite loss stays finite, a broken one stays broken, and the gradient notices nothing."""
    for number in LOSSES if dtype.is_floating_point else [0, 1]:
        loss = torch.full(shape, number, dtype=torch.float64).to(dtype)
        parameter = nn.Parameter(torch.tensor([sum_of_parameters, 0.0]))
        result = dummy_term([parameter], 1.0, loss=loss, max_fraction=1e-4)
        expected = torch.tensor(sum_of_parameters).to(result.uncapped)
        assert_same_bits(result.uncapped, expected, "sum")
        mean = loss.double().abs().mean().item()
        assert abs(result.value.double().item()) <= (1e-4 * mean if math.isfinite(mean) else 0)
        total = result.added_to(loss)
        assert torch.equal(total.isfinite(), loss.isfinite())
        assert total.shape == loss.shape
        assert total.dtype == (dtype if dtype.is_floating_point else torch.float32)
        if total.numel():
            total.sum().backward()
            expected = torch.full((2,), float(total.numel()))
            assert_same_bits(parameter.grad, expected, f"gradient at {number}")


def test_losses_whose_mean_overflows_get_no_dummy() -> None:
    """Each is finite, their mean is not a number that anything could be held against."""
    losses = torch.full((4,), 1e38)
    result = dummy_term([nn.Parameter(torch.tensor([3e38]))], 1.0, loss=losses, max_fraction=1e-4)
    assert result.loss.isinf()
    assert result.value == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_parameter_never_reaches_the_loss(bad: float) -> None:
    """It contributes nothing, is reported as it is, and still gets its gradient."""
    parameter = nn.Parameter(torch.tensor([1.0, bad]))
    result = term(parameter, loss=2.0)
    assert result.value.item() == 0
    assert not result.uncapped.isfinite()
    result.connected.backward()
    assert_same_bits(parameter.grad, torch.full((2,), 1e-7), "gradient")


@pytest.mark.parametrize("scale", [0.0, None])
def test_scale_zero_and_none_read_nothing(scale: float | None) -> None:
    """Parameters on `meta` have nothing to read. Zero gives exact zeros, None gives nothing."""
    on_meta = nn.Parameter(torch.ones(2, device="meta"))
    result = dummy_term([on_meta], scale, loss=torch.ones(()))
    assert result.value.item() == result.uncapped.item() == 0
    parameter = ones(2)
    dummy_term([parameter], scale).connected.backward()
    assert_same_bits(parameter.grad, None if scale is None else torch.zeros(2), "gradient")


@pytest.mark.parametrize("real", [0.0, -0.0, 1.0, -1e-40, math.inf, math.nan])
def test_an_unread_term_changes_no_bit(real: float) -> None:
    """Negative zero is the neutral element of addition, also for negative zero."""
    loss = torch.tensor(real)
    result = dummy_term([ones(2)], 1e-7, loss=loss, read_values=False)
    assert_same_bits((loss + result.connected).detach(), loss, "loss")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e-45, 1e-300])
@pytest.mark.parametrize("upstream", [1.0, -1.0, 2**-12, 1024.0])
def test_gradient_is_scale_times_upstream_and_not_zero(
    dtype: torch.dtype, scale: float, upstream: float
) -> None:
    """Rounded once where the dtype can hold it, at the dtype's floor where it cannot."""
    parameter = ones(3, dtype=dtype)
    connect_one(parameter, scale).backward(torch.tensor(upstream))
    exact = scale * upstream
    assert parameter.grad is not None
    got = parameter.grad[0].item()
    assert math.copysign(1, got) == math.copysign(1, upstream)
    assert got != 0
    if abs(exact) >= torch.finfo(dtype).tiny:
        assert got == pytest.approx(exact, rel=torch.finfo(dtype).eps)
    else:
        assert abs(got) <= torch.finfo(dtype).tiny


def test_an_upstream_of_zero_gives_zero() -> None:
    """Nothing flows where nothing is asked for; a NaN or infinite upstream stays visible."""
    for upstream, expected in ((0.0, 0.0), (math.inf, math.inf), (math.nan, math.nan)):
        parameter = ones(2)
        connect_one(parameter, 1e-7).backward(torch.tensor(upstream))
        assert_same_bits(parameter.grad, torch.full((2,), expected), str(upstream))


SAME = {"vectors": (5,), "matrices": (3, 4), "large": (9000,)}


@pytest.mark.parametrize("shape", SAME.values(), ids=SAME.keys())
def test_parameters_of_one_shape_keep_their_gradients_apart(shape: tuple[int, ...]) -> None:
    """Whoever changes one, in a hook or afterwards, changes no other; and they add up as usual."""
    params = [nn.Parameter(torch.ones(shape)) for _ in range(3)]
    handle = params[0].register_hook(lambda gradient: gradient * 3)
    connected = term(*params, scale=0.25).connected
    connected.backward(retain_graph=True)
    gradients = [param.grad for param in params if param.grad is not None]
    assert [gradient.unique().item() for gradient in gradients] == [0.75, 0.25, 0.25]
    gradients[1].mul_(4)
    assert [gradient.unique().item() for gradient in gradients] == [0.75, 1.0, 0.25]
    handle.remove()
    connected.backward()
    assert [gradient.unique().item() for gradient in gradients] == [1.0, 1.25, 0.5]
    for gradient in gradients:
        gradient.detach_().zero_()  # as older optimizers do; torch refuses it for views


def test_small_gradients_of_one_shape_are_slices_of_one_fill() -> None:
    """Autograd keeps them as they are; where gradients exist, it adds to what is there."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    for _ in range(2):
        term(*params, scale=0.25).connected.backward()
        gradients = [param.grad for param in params if param.grad is not None]
        assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == 1
    assert [gradient.unique().item() for gradient in gradients] == [0.5, 0.5, 0.5]


def test_one_gradient_of_a_shape_may_exist_already() -> None:
    """The first parameter of a shape is asked; whatever the others have, they are right."""
    for first in (0, 1):
        params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
        params[first].grad = torch.ones(4)
        term(*params, scale=0.25).connected.backward()
        for index, param in enumerate(params):
            expected = torch.full((4,), 1.25 if index == first else 0.25)
            assert_same_bits(param.grad, expected, f"{first} {index}")


def test_parameters_need_not_be_leaves() -> None:
    """What a parameter is reached through, such as a shard of it, hands its gradient on."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    term(*(param * 2 for param in params), scale=0.25).connected.backward()
    for param in params:
        assert_same_bits(param.grad, torch.full((4,), 0.5), "through a product")


@pytest.mark.parametrize("shape", SAME.values(), ids=SAME.keys())
def test_several_upstream_gradients_at_once(shape: tuple[int, ...]) -> None:
    """As for a Jacobian: `is_grads_batched` goes through backward once for all of them."""
    params = [nn.Parameter(torch.ones(shape)) for _ in range(3)]
    connected = term(*params, scale=0.25).connected
    upstream = torch.tensor([1.0, 2.0])
    found = torch.autograd.grad(connected, params, upstream, is_grads_batched=True)
    for gradient in found:
        assert gradient.shape == (2, *shape)
        assert [part.unique().item() for part in gradient] == [0.25, 0.5]


@pytest.fixture
def _flushed_subnormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("_flushed_subnormals")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-45, 1e-7])
def test_flushed_subnormals_do_no_harm(dtype: torch.dtype, scale: float) -> None:
    """The floor is a normal number of the dtype, or in float16 of the float32 behind it."""
    assert torch.tensor(1e-40) * 1 == 0
    parameter = ones(3, dtype=dtype)
    for _ in range(2):
        (term(parameter, scale=scale).connected / 4096).backward()
    assert parameter.grad is not None
    assert parameter.grad.all()
    if dtype != torch.float16:
        assert (parameter.grad.abs() >= torch.finfo(dtype).tiny).all()


@pytest.mark.usefixtures("_flushed_subnormals")
def test_with_flushed_subnormals_a_subnormal_scale_is_zero() -> None:
    """What is not promised: the processor does not tell the scale from zero."""
    parameter = ones(3)
    term(parameter, scale=1e-320).connected.backward()
    assert_same_bits(parameter.grad, torch.zeros(3), "gradient")


def test_gradcheck() -> None:
    """In double precision the analytic gradient is the numeric one, and so is its own."""
    params = [nn.Parameter(torch.randn(2, 3, dtype=torch.float64)) for _ in range(2)]

    def dummy(*inputs: Tensor) -> Tensor:
        return dummy_term(inputs, 0.5).connected

    assert torch.autograd.gradcheck(dummy, params)
    assert torch.autograd.gradgradcheck(dummy, params)


@pytest.mark.parametrize("upstream", [0.0, -0.0, 1.0, -2.0])
def test_the_gradient_of_a_dummy_gradient_is_the_scale(upstream: float) -> None:
    """Also where the upstream gradient is zero, which `gradgradcheck` never tries."""
    parameter, weight = ones(3), nn.Parameter(torch.tensor(upstream))
    connected = weight * connect_one(parameter, 0.25)
    (gradient,) = torch.autograd.grad(connected, parameter, create_graph=True)
    gradient.sum().backward()
    assert weight.grad == 0.75


def test_an_optimizer_may_step_between_forward_and_backward() -> None:
    """No parameter is saved for backward, so none is missed if it changes."""
    parameter = ones(2)
    connected = term(parameter).connected
    with torch.no_grad():
        parameter.add_(1)
    connected.backward()
    assert parameter.grad is not None


def test_the_loss_as_one_number() -> None:
    """Signed for a scalar, mean of sizes otherwise; always a copy."""
    scalar = torch.tensor(-2.0)
    seen = scalar_loss(scalar, torch.float32)
    scalar.mul_(3)
    assert seen.item() == -2
    assert scalar_loss(torch.tensor([-2.0, 4.0]), torch.float32).item() == 3
    assert scalar_loss(torch.tensor([-2, 4]), torch.float32).item() == 3
    assert scalar_loss(torch.tensor([60000.0] * 4, dtype=torch.float16), torch.float32) == 60000
