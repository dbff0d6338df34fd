"""The parts of `examples/umbrella`: what it reads, says, draws and configures."""

import itertools
import random
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from umbrella_batches import IGNORED, ModalitySampler, ask, collate
from umbrella_config import Config, ConfigError, load_config
from umbrella_scans import HELD_OUT, MODALITIES, SIZES, Sample, load_samples, split_crops
from umbrella_words import END, PAD, VOCABULARY, decode, encode, facts

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/umbrella"
SCANS = Path(nibabel.__file__).parent / "tests/data"
CONFIGS = sorted(EXAMPLE.glob("*.yaml"))

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def samples() -> dict[str, tuple[list[Sample], list[Sample]]]:
    return {name: load_samples(name) for name in MODALITIES}


def raw(name: str) -> Array:
    """The volume as the file has it."""
    if name == "dMRI":
        import dipy

        path = Path(dipy.__file__).parent / "data/files/small_64D.nii"
    else:
        file = {"T1": "anatomical.nii", "rsfMRI": "functional.nii"}[name]
        path = SCANS / file
    volume: Array = nibabel.Nifti1Image.from_filename(path).get_fdata()
    return volume


def windows(name: str, first: int, last: int) -> list[Array]:
    """Crops of the raw volume between two voxels of axis 1, in the order of the samples."""
    volume = raw(name)
    if name == "dMRI":
        s0 = volume[..., :1]
        volume = volume[..., 1:] / np.maximum(s0, 0.05 * s0.max())
    steps = {"T1": (3, 3, 3, 1), "rsfMRI": (1, 1, 1, 5), "dMRI": (1, 1, 1, 1)}[name]
    sizes = SIZES[name] + (1,) * (4 - len(SIZES[name]))
    volume = volume[:, first:last].reshape(volume.shape[0], last - first, volume.shape[2], -1)
    found = []
    for x in range(0, volume.shape[0] - sizes[0] + 1, steps[0]):
        for y in range(0, volume.shape[1] - sizes[1] + 1, steps[1]):
            for z in range(0, volume.shape[2] - sizes[2] + 1, steps[2]):
                for t in range(0, volume.shape[3] - sizes[3] + 1, steps[3]):
                    place = (slice(x, x + sizes[0]), slice(y, y + sizes[1]))
                    found.append(volume[(*place, slice(z, z + sizes[2]), slice(t, t + sizes[3]))])
    return found


def facts_of(name: str, crop: Array) -> tuple[float, str]:
    """The number whose thirds are levels, and the other word."""
    if name == "T1":
        right, left = crop[:4].mean(), crop[4:].mean()
        return crop.mean(), "left" if left > right else "right"
    if name == "rsfMRI":
        signal = [crop[..., time].mean() for time in range(10)]
        parts = {"early": signal[:4], "middle": signal[3:7], "late": signal[6:]}
        drift = np.mean(signal[5:]) - np.mean(signal[:5])
        return float(drift), max(parts, key=lambda part: float(np.mean(parts[part])))
    import dipy

    table = np.loadtxt(Path(dipy.__file__).parent / "data/files/small_64D.bvec")[1:]
    signal = [crop[..., direction].mean() for direction in range(64)]
    along = [np.average(signal, weights=table[:, axis] ** 2) for axis in range(3)]
    return crop.mean(), "xyz"[int(np.argmin(along))]


@pytest.mark.parametrize("name", MODALITIES)
def test_answers_are_what_the_raw_scans_show(name: str, samples: Any) -> None:
    """Recomputed crop by crop from the files, before anything is standardised."""
    start, stop = HELD_OUT[name]
    train = windows(name, 0, start)
    if raw(name).shape[1] - stop >= SIZES[name][1]:
        train += windows(name, stop, raw(name).shape[1])
    held_out = windows(name, start, stop)
    measured = [facts_of(name, crop) for crop in train]
    numbers = sorted(number for number, _ in measured)
    low, high = (np.quantile(numbers, share) for share in (1 / 3, 2 / 3))
    for crops, own in zip((train, held_out), samples[name], strict=True):
        assert len(crops) == len(own) > 0
        for crop, sample in zip(crops, own, strict=True):
            number, word = facts_of(name, crop)
            if min(abs(number - low), abs(number - high)) < 1e-5 * abs(numbers[-1] - numbers[0]):
                continue  # on the border, where float32 may fall to the other side
            level = "low" if number < low else "middle" if number < high else "high"
            assert list(facts(sample.answer).values()) == [level, word]


def test_left_is_left() -> None:
    """Voxels of the first axis of the T1 file go to the left."""
    image = nibabel.Nifti1Image.from_filename(SCANS / "anatomical.nii")
    # Coordinates grow to the right.
    assert image.affine[0].tolist()[:3] == [-2, 0, 0]


@pytest.mark.parametrize("name", MODALITIES)
def test_crops_are_the_scans_standardised(name: str, samples: Any) -> None:
    """The crops for training have mean 0 and variance 1, and correlate with the raw ones."""
    train, _ = samples[name]
    pixels = torch.stack([sample.pixel_values for sample in train])
    assert list(pixels.shape[1:]) == [*([1] if name == "T1" else []), *SIZES[name]]
    assert pixels.mean().item() == pytest.approx(0, abs=1e-4)
    assert pixels.std().item() == pytest.approx(1, abs=1e-4)
    crop = windows(name, 0, HELD_OUT[name][0])[0].reshape(SIZES[name])
    if name == "rsfMRI":
        crop = crop - crop.mean(-1, keepdims=True)
    own = pixels[0].numpy().ravel()
    assert np.corrcoef(own, crop.ravel())[0, 1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", MODALITIES)
def test_held_out_crops_share_no_voxel_with_training(name: str) -> None:
    shape = raw(name).shape[:3] + SIZES[name][3:]
    volume = torch.arange(np.prod(shape)).reshape(shape)
    train, held_out = (set(crops.flatten().tolist()) for crops in split_crops(volume, name))
    assert train.isdisjoint(held_out)
    assert len(train) > len(held_out) > 0


def test_every_word_that_is_said_can_be_written(samples: Any) -> None:
    """And read again, up to the end."""
    answers = {s.answer for parts in samples.values() for part in parts for s in part}
    assert len(answers) > 12
    for answer in answers:
        assert decode([*encode(answer), END, PAD, 5]) == answer
    with pytest.raises(ValueError, match=r"lacks \['tall'\]"):
        encode("intensity tall")
    assert facts("intensity high , brighter left") == {"intensity": "high", "brighter": "left"}
    assert facts("high , the left scan") == {}
    assert list(VOCABULARY.values()) == list(range(len(VOCABULARY)))


def few(name: str, *answers: str) -> list[Sample]:
    return [Sample(name, torch.full((2, 2), float(i)), text) for i, text in enumerate(answers)]


def test_a_batch_is_keyed_by_modality() -> None:
    """Text is padded at the right; only answer and end are learned."""
    t1 = few("T1", "intensity low , brighter left", "intensity low")
    batch = collate([t1[0], *few("dMRI", "signal high"), t1[1]])
    assert list(batch) == ["T1", "dMRI"]
    assert list(batch["T1"]) == ["pixel_values", "input_ids", "attention_mask", "labels"]
    assert batch["T1"]["pixel_values"][:, 0, 0].tolist() == [0, 1]
    prompt = encode("describe the T1 scan :")
    answers = [[*encode(sample.answer), END] for sample in t1]
    ids, mask, labels = (
        batch["T1"][key].tolist() for key in ("input_ids", "attention_mask", "labels")
    )
    assert ids == [prompt + answers[0], prompt + answers[1] + [PAD] * 3]
    assert mask == [[1] * 11, [1] * 8 + [0] * 3]
    assert labels == [[IGNORED] * 5 + answers[0], [IGNORED] * 5 + answers[1] + [IGNORED] * 3]
    asked = ask(t1)["T1"]
    assert asked["input_ids"].tolist() == [prompt, prompt]
    assert "labels" not in asked


def sampler(**changes: Any) -> ModalitySampler:
    names = random.Random(0).choices(MODALITIES, k=90)
    given = {"batch_size": 8, "num_batches": 60, "mixed_share": 0.5, "seed": 0} | changes
    return ModalitySampler(given.pop("modalities", names), **given)


def batches(sampler: ModalitySampler) -> list[list[int]]:
    places = list(sampler)
    assert len(places) == len(sampler)
    return [places[start : start + 8] for start in range(0, len(places), 8)]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_batches_hold_one_modality_or_several(share: float) -> None:
    """In the share that was asked for; each modality in it has as many samples, but for one."""
    names = random.Random(0).choices(MODALITIES, k=90)
    drawn = [Counter(names[place] for place in b) for b in batches(sampler(mixed_share=share))]
    mixed = [counts for counts in drawn if len(counts) > 1]
    assert len(mixed) / len(drawn) == pytest.approx(share, abs=0.15)
    assert all(max(counts.values()) - min(counts.values()) <= 1 for counts in drawn)
    assert {name for counts in drawn for name in counts} == set(MODALITIES)
    assert {len(counts) for counts in mixed} == ({2, 3} if share else set())


def test_batches_depend_on_seed_and_number_alone() -> None:
    """So that a resumed run, and a longer one, gets the same; another seed does not."""
    first = batches(sampler())
    assert batches(sampler()) == first
    assert batches(sampler(num_batches=90))[:60] == first
    assert sampler().batch(42) == first[42]
    assert batches(sampler(seed=1)) != first
    assert len({tuple(batch) for batch in first}) == len(first)


def test_a_single_modality_is_never_mixed() -> None:
    assert len(batches(sampler(modalities=["T1"] * 9, mixed_share=1.0))) == 60


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_can_be_read(path: Path) -> None:
    config = load_config(path)
    assert config.hold
    assert config.steps == 200
    assert config.out == f"umbrella-output/{path.stem}"


def test_commands_of_the_page_name_what_there_is() -> None:
    """Configurations, and keys that `--set` knows."""
    commands = re.findall(r"^\$ .*?train\.py (.*)$", (EXAMPLE / "README.md").read_text(), re.M)
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command, comments=True)
        values = dict(itertools.pairwise(words))
        load_config(ROOT / values["--config"], [values["--set"]] if "--set" in values else [])


def test_there_are_the_configs_of_the_original() -> None:
    """T1 alone, with embeddings of the others; T1 and rsfMRI; all."""
    read = {path.stem: load_config(path) for path in CONFIGS}
    assert {name: (c.modalities, c.towers) for name, c in read.items()} == {
        "t1": (("T1",), MODALITIES),
        "t1_fmri": (("T1", "rsfMRI"), ("T1", "rsfMRI")),
        "all": (MODALITIES, MODALITIES),
    }


def test_overrides_come_before_the_file(tmp_path: Path) -> None:
    """As YAML, and numbers that YAML takes for text."""
    path = tmp_path / "config.yaml"
    path.write_text("modalities: [T1]\nout: here\nsteps: 7\n")
    assert load_config(path) == Config(("T1",), "here", steps=7)
    overrides = ["steps=9", "modalities=[dMRI, T1]", "learning_rate=3e-4", "hold=false", "scale=1"]
    assert load_config(path, overrides) == Config(
        ("dMRI", "T1"), "here", steps=9, learning_rate=3e-4, hold=False, scale=1.0
    )
    assert load_config(path, ["modalities=dMRI"]).modalities == ("dMRI",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepps=3", "There is no key 'stepps'; did you mean 'steps'? There are: modalities, out"),
        ("wheels=3", "There is no key 'wheels'; There are:"),
        ("steps", "--set takes key=value such as steps=50, got 'steps'"),
        ("steps=[", "--set steps=[ is not YAML"),
        ("steps=many", "`steps` must be of type int, got 'many'"),
        ("steps=true", "`steps` must be of type int, got True"),
        ("steps=0", "`steps` must be at least 1, got 0"),
        ("hold=1", "`hold` must be of type bool, got 1"),
        ("learning_rate=fast", "`learning_rate` must be of type float, got 'fast'"),
        ("learning_rate=true", "`learning_rate` must be of type float, got True"),
        ("learning_rate=.inf", "`learning_rate` must be a number above 0, got inf"),
        ("scale=0", "`scale` must be a number above 0, got 0.0"),
        ("mixed_share=1.5", "`mixed_share` must be from 0 to 1, got 1.5"),
        ("mixed_share=.nan", "`mixed_share` must be from 0 to 1, got nan"),
        ("seed=-1", "`seed` must be from 0 to 2**32 - 1, got -1"),
        ("out=", "`out` must be of type str, got None"),
        ("out=''", "`out` must be a folder, got ''"),
        ("modalities=3", "`modalities` must be a list of names, got 3"),
        ("modalities=[PET]", "`modalities` must name some of T1, rsfMRI, dMRI, each once"),
        ("modalities=[T1, T1]", "each once, got ['T1', 'T1']"),
        ("modalities=[]", "`modalities` must name some of"),
        ("towers=[T1]", "`towers` lacks ['rsfMRI', 'dMRI'], which `modalities` has"),
        ("batch_size=2", "`batch_size` must be at least 3, one sample of each of"),
    ],
)
def test_wrong_values_are_told(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(EXAMPLE / "all.yaml", [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- T1", "must contain keys and values, got ['T1']"),
        ("", "must contain keys and values, got None"),
        ("a: [", "is not YAML"),
        ("steps: 3", "lacks modalities, out"),
    ],
)
def test_files_that_are_no_config_are_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "config.yaml")
    assert message in str(error.value)
