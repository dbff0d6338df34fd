"""Models of transformers, made small from their configurations and trained as they are."""

import copy
from collections.abc import Iterator

import pytest
import torch

from modaldummy import (
    DummyLossWrapper,
    gradient_norms,
    hold_inactive,
    missing_gradients,
    preflight,
)
from tests.asserts import assert_bounded, assert_connected, assert_same_bits
from tests.integrations.foreign import (
    FLAVA_MAP,
    FOREIGN,
    Batch,
    Foreign,
    flava_batches,
    flava_modalities,
    make_flava,
    make_qwen,
    qwen_batches,
)

LIBRARIES = ("transformers",)

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
def test_it_trains_as_without_us_and_every_parameter_has_a_gradient(foreign: Foreign) -> None:
    """Losses, real gradients and parameters stay bit for bit those of AdamW on the bare model."""
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
def test_its_norms_are_labelled_by_what_the_batch_holds(foreign: Foreign) -> None:
    model, wrapper = wrapped(foreign)
    for batch in steps(foreign, 1):
        model.zero_grad()
        wrapper.total(model(**batch).loss, batch).backward()
        active = set(foreign.resolver(batch))
        expected = set()
        for key in foreign.spec:
            members = (key,) if isinstance(key, str) else key
            label = f"[{'-'.join(members)}]/" if active.issuperset(members) else "[inactive]/"
            if active.issuperset(wrapper.modalities):
                label = ""
            expected |= {
                f"grad/{label}{name}"
                for name, parameter in wrapper.named_parameters(key).items()
                if parameter.requires_grad
            }
        assert {name for name in gradient_norms(wrapper) if name.startswith("grad/")} == expected


@pytest.mark.parametrize("foreign", CASES)
def test_preflight_has_nothing_to_say_of_any_batch(foreign: Foreign) -> None:
    """Each trainable parameter is in the trunk, or belongs to a modality that reaches it."""
    model, wrapper = wrapped(foreign)
    optimizer = torch.optim.AdamW(model.parameters())
    assert {finding.code for finding in preflight(wrapper, optimizer)} == {"MD141"}
    hold_inactive(wrapper, optimizer)
    for batch in steps(foreign, 1):
        total = wrapper.total(model(**batch).loss, batch)
        assert preflight(wrapper, optimizer, loss=total) == []


def test_what_no_batch_reaches_is_named() -> None:
    """FLAVA's poolers: by preflight before backward, by `missing_gradients` after it."""
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


def test_a_head_that_only_some_batches_use_needs_a_modality_of_its_own() -> None:
    """FLAVA leaves its unimodal losses out where images and text come together."""
    model = FOREIGN["FLAVA"].make()
    spec = FLAVA_MAP | {"image": ["flava.image_model", "mim_head"]}
    del spec["mim"]
    wrapper = DummyLossWrapper(
        model, spec, resolver=lambda batch: [m for m in flava_modalities(batch) if m != "mim"]
    )
    missing = {}
    for kind, batch in flava_batches().items():
        model.zero_grad()
        wrapper.total(model(**batch).loss, batch).backward()
        missing[kind] = missing_gradients(wrapper)
    names = tuple(name for name in wrapper.named_parameters("image") if name.startswith("mim"))
    assert missing == {"text": {}, "image": {}, "both": {"image": names}}


def test_a_wrapped_forward_keeps_its_output() -> None:
    """A `ModelOutput` with another loss, and all else as it was."""
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


@pytest.mark.long
def test_a_head_tied_to_the_trunk_is_reported() -> None:
    """Qwen2-VL's output layer is its table of tokens, which every batch reaches."""
    model = make_qwen()
    assert model.get_parameter("lm_head.weight") is model.get_parameter(
        "model.language_model.embed_tokens.weight"
    )
    wrapper = DummyLossWrapper(model, {"image": "model.visual", "text": "lm_head"})
    assert "MD118" in {finding.code for finding in preflight(wrapper)}


@pytest.mark.long
def test_a_frozen_tower_needs_nothing() -> None:
    """With all of Qwen2-VL's vision frozen the loss stays the object that it was."""
    model = make_qwen()
    model.get_submodule("model.visual").requires_grad_(False)
    wrapper = DummyLossWrapper(model, {"image": "model.visual"})
    assert {finding.code for finding in preflight(wrapper)} == {"MD113"}
    real = model(**qwen_batches()["text"]).loss
    assert wrapper.total(real, []) is real
