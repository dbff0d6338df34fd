"""Models of transformers, made small by their configurations and not changed otherwise."""

import copy
from collections.abc import Iterator

import pytest
import torch

from modaldummy import DummyLossWrapper, hold_inactive, missing_gradients, preflight
from tests.asserts import assert_bounded, assert_connected, assert_same_bits
from tests.integrations.foreign import (
    FLAVA_MAP,
    FOREIGN,
    Batch,
    Foreign,
    flava_batches,
    flava_modalities,
    make_flava,
)

CASES = [
    pytest.param(foreign, id=name, marks=[] if name == "FLAVA" else [pytest.mark.long])
    for name, foreign in FOREIGN.items()
]


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def wrapped(foreign: Foreign) -> tuple[torch.nn.Module, DummyLossWrapper]:
    model = foreign.make()
    return model, DummyLossWrapper(model, foreign.spec, resolver=foreign.resolver)


def steps(foreign: Foreign, rounds: int) -> Iterator[Batch]:
    batches = foreign.batches()
    for _ in range(rounds):
        yield from batches.values()


@pytest.mark.parametrize("foreign", CASES)
def test_held_training_is_that_of_the_bare_model_and_no_gradient_is_missing(
    foreign: Foreign,
) -> None:
    """Losses, real gradients and parameters bit for bit, with AdamW."""
    model, wrapper = wrapped(foreign)
    bare = copy.deepcopy(model)
    twins = dict(bare.named_parameters())
    ours = torch.optim.AdamW(model.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(bare.parameters(), lr=1e-2)
    hold = hold_inactive(wrapper, ours)
    held = set()
    for batch in steps(foreign, 3):
        real, expected = model(**batch).loss, bare(**batch).loss
        wrapper.total(real, batch).backward()
        expected.backward()
        assert_same_bits(real.detach(), expected.detach(), "loss")
        assert wrapper.last is not None
        assert_bounded(wrapper.last)
        inactive = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and twins[name].grad is None:
                inactive[name] = parameter
            else:
                assert_same_bits(parameter.grad, twins[name].grad, name)
        for name, parameter in inactive.items():
            assert_same_bits(parameter.grad, torch.full_like(parameter, 1e-7).detach(), name)
        missing_gradients(wrapper, strict=True)
        ours.step()
        theirs.step()
        assert {name for name in hold.held if twins[name].requires_grad} == set(inactive)
        for name, parameter in model.named_parameters():
            assert_same_bits(parameter.detach(), twins[name].detach(), name)
        ours.zero_grad()
        theirs.zero_grad()
        held |= set(inactive)
    owned = {name for key in foreign.spec for name in wrapper.named_parameters(key)}
    assert held == {name for name in owned if twins[name].requires_grad}


@pytest.mark.parametrize("foreign", CASES)
def test_preflight_finds_nothing_in_any_batch(foreign: Foreign) -> None:
    """Each batch reaches the trunk and the parameters of its modalities."""
    model, wrapper = wrapped(foreign)
    optimizer = torch.optim.AdamW(model.parameters())
    assert {finding.code for finding in preflight(wrapper, optimizer)} == {"MD141"}
    hold_inactive(wrapper, optimizer)
    for batch in steps(foreign, 1):
        total = wrapper.total(model(**batch).loss, batch)
        assert preflight(wrapper, optimizer, loss=total) == []


def test_parameters_that_no_batch_reaches_are_named() -> None:
    """FLAVA's poolers: by `preflight` before backward, by `missing_gradients` after it."""
    model = make_flava()
    wrapper = DummyLossWrapper(model, FLAVA_MAP, resolver=flava_modalities)
    batch = flava_batches()["both"]
    total = wrapper.total(model(**batch).loss, batch)
    total.backward()
    pooler = "flava.{}_model.pooler.dense.{}"
    expected = {
        key: tuple(pooler.format(name, part) for part in ("weight", "bias"))
        for key, name in [("image", "image"), ("text", "text"), ("image-text", "multimodal")]
    }
    assert missing_gradients(wrapper) == expected
    findings = [found for found in preflight(wrapper, loss=total) if found.code == "MD121"]
    assert [set(found.evidence["parameters"]) for found in findings] == [
        {name for names in expected.values() for name in names}
    ]


def test_a_wrapped_forward_keeps_its_output() -> None:
    """A `ModelOutput` with another loss, and nothing else changes."""
    model, wrapper = wrapped(FOREIGN["FLAVA"])
    batch = flava_batches()["text"]
    plain = model(**batch)
    output = wrapper(model.forward)(**batch, modalities=flava_modalities(batch))
    assert type(output) is type(plain)
    assert output.keys() == plain.keys()
    assert torch.equal(output.mlm_logits, plain.mlm_logits)
    assert wrapper.last is not None
    assert torch.equal(output.loss, plain.loss + wrapper.last.dummy)
    output.loss.backward()
    assert_connected(wrapper.named_parameters("mim"))
