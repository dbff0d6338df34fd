"""The model of `examples/umbrella`: its loss, its gradients, its text."""

import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from modaldummy import DummyLossWrapper
from umbrella_batches import IGNORED, Batch, ask, collate
from umbrella_generation import describe
from umbrella_model import PATCHES, Umbrella, _patches, parameter_map
from umbrella_scans import MODALITIES, SIZES, Sample

pytestmark = pytest.mark.usefixtures("one_thread")

ANSWERS = {
    "T1": "intensity low , brighter left",
    "rsfMRI": "drift high , peak late",
    "dMRI": "signal middle , diffusion x",
}


@pytest.fixture
def model() -> Umbrella:
    torch.manual_seed(0)
    return Umbrella(MODALITIES)


def some(name: str, answer: str = "") -> Sample:
    shape = (1, *SIZES[name]) if name == "T1" else SIZES[name]
    return Sample(name, torch.randn(shape), answer or ANSWERS[name])


@pytest.fixture
def samples() -> list[Sample]:
    """Three of T1, one with a shorter answer, one of each of the others."""
    torch.manual_seed(1)
    short = some("T1", "intensity high")
    return [some("T1"), some("rsfMRI"), short, some("dMRI"), some("T1")]


def loss_of(model: Umbrella, batch: Batch) -> Any:
    return model(**batch)["loss"]


def test_the_loss_is_the_mean_over_samples(model: Umbrella, samples: list[Sample]) -> None:
    """Of all modalities, each sample alone and unpadded."""
    alone = [loss_of(model, collate([sample])) for sample in samples]
    assert loss_of(model, collate(samples)).item() == pytest.approx(
        torch.stack(alone).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("name", MODALITIES)
def test_only_the_answer_is_learned(name: str, model: Umbrella) -> None:
    """The naive loss: each token of the answer and the end, from the position before it."""
    batch = collate([some(name)])
    output = model(**batch)
    logits, labels = output["logits"][name][0], batch[name]["labels"][0].tolist()
    num_patches = len(logits) - len(labels)
    terms = [
        cross_entropy(logits[num_patches + place - 1], torch.tensor(label))
        for place, label in enumerate(labels)
        if label != IGNORED
    ]
    assert len(terms) == 6
    assert output["loss"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


@pytest.mark.parametrize("held", [["T1"], ["rsfMRI", "dMRI"], list(MODALITIES)], ids=str)
def test_a_modality_teaches_its_own_parameters_and_the_trunk(
    held: list[str], model: Umbrella
) -> None:
    """The map has what is otherwise without a gradient, and nothing else."""
    loss_of(model, collate([some(name) for name in held])).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    wrapper = DummyLossWrapper(model, parameter_map(MODALITIES))
    absent = [name for name in MODALITIES if name not in held]
    assert without == {key for name in absent for key in wrapper.named_parameters(name)}
    assert all(len(wrapper.named_parameters(name)) == 3 for name in MODALITIES)


@pytest.mark.parametrize("name", ["rsfMRI", "dMRI"])
def test_patches_over_four_axes(name: str) -> None:
    """By hand, in the order of the axes."""
    size, patch = SIZES[name], PATCHES[name]
    data = torch.randn(2, *size)
    starts = itertools.product(*(range(0, s, p) for s, p in zip(size, patch, strict=True)))
    expected = [
        data[:, x : x + patch[0], y : y + patch[1], z : z + patch[2], t : t + patch[3]].flatten(1)
        for x, y, z, t in starts
    ]
    assert torch.equal(_patches(data, patch), torch.stack(expected, dim=1))


def test_the_image_is_looked_at(model: Umbrella) -> None:
    """Another crop, another prediction, for each modality."""
    for name in MODALITIES:
        one, other = (model(**collate([some(name)]))["logits"][name] for _ in range(2))
        assert not torch.allclose(one[:, -1], other[:, -1])


def test_generated_tokens_are_the_likeliest(model: Umbrella, samples: list[Sample]) -> None:
    """Read back all at once, each is what the model would say after those before it."""
    batch = ask(samples)
    answers = model.generate(batch, 4)
    assert list(answers) == ["T1", "rsfMRI", "dMRI"]
    for name, answer in answers.items():
        ids = torch.cat([batch[name]["input_ids"], answer], dim=1)
        part = {**batch[name], "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**{name: part | {"labels": ids}})["logits"][name]
        assert torch.equal(logits[:, -5:-1].argmax(dim=-1), answer)
    assert all(torch.equal(model.generate(batch, 4)[name], answers[name]) for name in answers)


def test_right_facts_are_counted(model: Umbrella, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fact by fact, whatever else was said; the model trains on as before."""
    samples = [some("T1", answer) for answer in ("intensity low , brighter left",) * 3]
    said = ["intensity low , brighter right", "intensity low , peak left", "intensity , , brighter"]
    spoken = [collate([some("T1", text)])["T1"]["input_ids"][0, 5:10] for text in said]
    spoken[2] = torch.cat([spoken[2], spoken[2]])[:5]

    def generate(batch: Batch, num_tokens: int) -> Any:
        assert not model.training
        assert num_tokens == 5
        return {"T1": torch.stack(spoken)}

    monkeypatch.setattr(model, "generate", generate)
    line = describe(model, samples, torch.device("cpu"))
    assert line["right"] == {"intensity": 2, "brighter": 0}
    assert line["of"] == 3
    assert line["shown"][0] == [said[0], samples[0].answer]
    assert model.training
