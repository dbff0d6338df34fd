"""What cannot be held is refused with the way out, and nothing is left behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW

from modaldummy import ModalDummyError, UnsupportedEngineError, hold_inactive
from modaldummy._hold.holder import holder_of, is_held
from tests.holding import NAMES, Towers

MODEL = Towers()
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "no wrapper": (
        lambda: hold_inactive(MODEL, AdamW(MODEL.parameters())),  # type: ignore[arg-type]
        TypeError,
        ["`wrapper`", "DummyLossWrapper", "a Towers module"],
    ),
    "several optimizers": (
        lambda: hold_inactive(MODEL.wrapper(), [AdamW(MODEL.parameters())]),  # type: ignore[arg-type]
        TypeError,
        ["`optimizer`", "torch.optim.Optimizer", "list", "once for each"],
    ),
    "no group": (
        lambda: hold_inactive(MODEL.wrapper(), AdamW(MODEL.parameters()), group="nccl"),  # type: ignore[arg-type]
        TypeError,
        ["`group`", "ProcessGroup", "'nccl'"],
    ),
    "parameters of another model": (
        lambda: hold_inactive(MODEL.wrapper(), AdamW(Towers().parameters())),
        ValueError,
        ["AdamW", "no parameter", "'T1', 'rsfMRI', 'dMRI'", "moved or sharded"],
    ),
    "the trunk alone": (
        lambda: hold_inactive(MODEL.wrapper(), AdamW(MODEL.trunk.parameters())),
        ValueError,
        ["no parameter of the modalities"],
    ),
    "L-BFGS": (
        lambda: hold_inactive(MODEL.wrapper(), LBFGS(MODEL.parameters())),
        UnsupportedEngineError,
        ["LBFGS", "one direction", "another optimizer"],
    ),
    "fused SGD with momentum": (
        lambda: hold_inactive(MODEL.wrapper(), SGD(MODEL.parameters(), momentum=0.9, fused=True)),
        UnsupportedEngineError,
        ["`fused=True` and momentum", "foreach=True"],
    ),
    "fused SGD with momentum in one group": (
        lambda: hold_inactive(
            MODEL.wrapper(),
            SGD(
                [
                    {"params": MODEL.trunk.parameters()},
                    {"params": MODEL.towers.parameters(), "momentum": 0.9},
                ],
                fused=True,
            ),
        ),
        UnsupportedEngineError,
        ["`fused=True` and momentum"],
    ),
    "an optimizer around another": (
        lambda: hold_inactive(
            MODEL.wrapper(), Accelerator(cpu=True).prepare(AdamW(MODEL.parameters()))
        ),
        TypeError,
        ["AcceleratedOptimizer", "no step hooks", "`optimizer.optimizer`"],
    ),
}


@pytest.mark.parametrize(("call", "kind", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_say_what_to_do(
    call: Callable[[], Any], kind: type[Exception], words: list[str]
) -> None:
    with pytest.raises(kind) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_the_inner_optimizer_of_accelerate_is_held() -> None:
    """The way out that the message names."""
    model = Towers()
    wrapper = model.wrapper()
    optimizer = Accelerator(cpu=True).prepare(AdamW(model.parameters()))
    handle = hold_inactive(wrapper, optimizer.optimizer)
    wrapper.total(model.loss(["T1"]), "T1").backward()
    optimizer.step()
    assert len(handle.held) == 4


def test_a_refused_hold_leaves_nothing_behind() -> None:
    wrapper, optimizer = MODEL.wrapper(), AdamW(Towers().parameters())
    with pytest.raises(ValueError, match="no parameter"):
        hold_inactive(wrapper, optimizer)
    assert wrapper._observers == []
    assert holder_of(optimizer).holds == []
    assert not is_held(wrapper, optimizer)


def test_the_error_is_ours_and_a_runtime_error() -> None:
    assert issubclass(UnsupportedEngineError, ModalDummyError)
    assert issubclass(UnsupportedEngineError, RuntimeError)


def test_why_fused_sgd_with_momentum_is_refused() -> None:
    """If torch has learned to do it, the refusal can go."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SGD([first, second], momentum=0.9, fused=True)
    first.grad = torch.ones(2)
    optimizer.step()
    second.grad = torch.ones(2)
    with pytest.raises(TypeError, match="NoneType"):
        optimizer.step()


def test_an_optimizer_that_lost_all_parameters_of_the_map_says_so() -> None:
    """As where an engine puts flat copies in their place."""
    model = Towers()
    wrapper, optimizer = model.wrapper(), AdamW(model.parameters())
    hold_inactive(wrapper, optimizer)
    (group,) = optimizer.param_groups
    group["params"] = list(model.trunk.parameters())

    def loss() -> Tensor:
        return model.trunk(model.towers["T1"](torch.ones(2, 3))).square().mean()  # type: ignore[no-any-return]

    wrapper.total(loss(), NAMES).backward()
    optimizer.step()  # where all modalities are there, nothing is to be held
    wrapper.total(loss(), "T1").backward()
    with pytest.raises(UnsupportedEngineError, match="no parameter of the modalities any more"):
        optimizer.step()
