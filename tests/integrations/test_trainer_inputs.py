"""What reaches the wrapper and what reaches the model, in training and in evaluation."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import default_data_collator

import modaldummy.integrations.transformers as integration
from modaldummy import BatchMetadataError, DummyLossWrapper, UnknownModalityError
from tests.integrations.trainers import (
    BATCH,
    EVALUATING,
    MAP,
    WIDTHS,
    MixedTrainer,
    Recorder,
    Scanner,
    arguments,
    mixed,
    owner_of,
    scanner,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = list(WIDTHS)
ORDER = ["T1", "dMRI", "T1", "rsfMRI"]  # one modality a batch


class Wide(Scanner):
    """Knows a scan by its width alone, and keeps the names of all that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def forward(  # type: ignore[override]
        self, scan: Tensor, labels: Tensor | None = None, **others: Any
    ) -> dict[str, Tensor]:
        self.seen |= set(others) - {"num_items_in_batch"}
        (name,) = (name for name, width in WIDTHS.items() if width == scan.shape[1])
        return super().forward(**{name: scan}, labels=labels)


class Asking(Wide):
    """Names the metadata as an argument of its own."""

    def forward(  # type: ignore[override]
        self,
        scan: Tensor,
        labels: Tensor | None = None,
        modality: Any = None,
        num_items_in_batch: Any = None,
    ) -> dict[str, Tensor]:
        self.seen |= {"modality"} if modality is not None else set()
        return super().forward(scan, labels)


def wide(kind: type[Wide] = Wide) -> Wide:
    torch.manual_seed(0)
    return kind()


def scans(key: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    """Samples whose modality stands at `key` alone, in the words of `values`."""
    found = []
    for place, name in enumerate(ORDER):
        draw = torch.Generator().manual_seed(place)
        for _ in range(BATCH):
            scan = torch.randn(WIDTHS[name], generator=draw)
            found.append({"scan": scan, "labels": 0.5, key: values[name], "site": "A"})
    return found


def keeping(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As the default collator, but for strings, which it makes a list of."""
    batch: dict[str, Any] = default_data_collator(list(samples))
    texts = [key for key, value in samples[0].items() if isinstance(value, str)]
    return batch | {key: [sample[key] for sample in samples] for key in texts}


def check_steps(own: Recorder) -> None:
    """Each step has the dummy where, and only where, its modality is not."""
    assert len(own.steps) == len(ORDER)
    for step, active in zip(own.steps, ORDER, strict=True):
        for name, gradient in step.items():
            assert gradient is not None
            idle = owner_of(name) not in (None, active)
            assert (gradient.abs().max() < 1e-6) == idle, name


ITSELF = {name: name for name in NAMES}
PLACES = {name: place for place, name in enumerate(NAMES)}
# Column, its values, collator, and options of the Trainer.
COLUMNS: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "strings": ("modality", ITSELF, keeping, {}),
    "integers": ("modality", PLACES, default_data_collator, {}),
    "a mask": (
        "modalities",
        {name: [name == other for other in NAMES] for name in NAMES},
        default_data_collator,
        {},
    ),
    "a column of another name": ("kind", ITSELF, keeping, {"metadata_columns": "kind"}),
    "several columns": ("kind", ITSELF, keeping, {"metadata_columns": ["site", "kind"]}),
}


@pytest.mark.parametrize(
    ("column", "values", "collator", "options"), COLUMNS.values(), ids=COLUMNS.keys()
)
def test_a_column_tells_the_modality_and_stays_out_of_the_model(
    column: str,
    values: dict[str, Any],
    collator: Any,
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    """In training, evaluation within it, and prediction."""
    model, own = wide(), Recorder()
    resolver = (lambda batch: batch["kind"]) if column == "kind" else None
    wrapper = DummyLossWrapper(model, MAP, resolver=resolver)
    data = scans(column, values)
    options = options | {"train_dataset": data, "eval_dataset": data, "data_collator": collator}
    args = arguments(tmp_path, **EVALUATING)
    trainer = mixed(model, args, wrapper=wrapper, callbacks=[own], **options)
    trainer.train()
    trainer.predict(data)
    check_steps(own)
    assert model.seen == set()


def test_columns_that_are_not_removed_stay_out_of_the_model_too(tmp_path: Path) -> None:
    model, own = wide(), Recorder()
    data = scans("modality", PLACES)
    args = arguments(tmp_path, remove_unused_columns=False)
    mixed(model, args, train_dataset=data, callbacks=[own]).train()
    check_steps(own)
    assert model.seen == set()


def test_what_is_predicted_without_labels_comes_without_metadata_too(tmp_path: Path) -> None:
    model = wide()
    data = [{k: v for k, v in s.items() if k != "labels"} for s in scans("modality", PLACES)]
    trainer = mixed(model, arguments(tmp_path), train_dataset=data)
    assert trainer.predict(data).predictions.shape == (BATCH * len(ORDER),)
    assert model.seen == set()


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_ranks_of_sharding_engines_are_asked_before_forward(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate has neither engine on a CPU: it is told that there is one."""
    model = scanner()
    trainer = mixed(model, arguments(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    asked = []

    def ask(*given: Any, **named: Any) -> None:
        asked.append((given, named))
        raise BatchMetadataError("of another rank")

    monkeypatch.setattr(integration, "check_ranks", ask)
    trainer.compute_loss(model, batch)
    assert asked == []
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType[engine])
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(BatchMetadataError) as caught:
        trainer.compute_loss(model, batch)
    assert asked == [((trainer.wrapper, batch), {"model": model})]
    assert caught.value.__notes__


def test_a_model_that_names_the_metadata_gets_it(tmp_path: Path) -> None:
    model, own = wide(Asking), Recorder()
    data = scans("modality", ITSELF)
    options = {"train_dataset": data, "data_collator": keeping, "callbacks": [own]}
    mixed(model, arguments(tmp_path), **options).train()
    check_steps(own)
    assert model.seen == {"modality"}


class WithColumns(MixedTrainer):
    """Fixes its columns, as Trainers do that prepare a dataset themselves."""

    def _set_signature_columns_if_needed(self) -> None:
        columns: Any = ["scan", "labels", "modality"]
        self._signature_columns = columns


def test_who_names_the_metadata_is_the_model_and_not_the_columns(tmp_path: Path) -> None:
    data = scans("modality", ITSELF)
    options = {"train_dataset": data, "data_collator": keeping}
    model = wide(Asking)
    mixed(model, arguments(tmp_path), WithColumns, **options).train()
    assert model.seen == {"modality"}
    mixed(wide(), arguments(tmp_path), WithColumns, **options).train()


def test_a_collator_that_drops_strings_is_told_of(tmp_path: Path) -> None:
    """The Trainer's default does; the note names both ways out."""
    model = wide()
    trainer = mixed(model, arguments(tmp_path), train_dataset=scans("modality", ITSELF))
    with pytest.raises(BatchMetadataError) as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    assert "default collators drop strings" in note
    assert "`data_collator`" in note
    assert "`metadata_columns`" in note


def test_a_column_that_nobody_asked_for_is_dropped_with_a_note(tmp_path: Path) -> None:
    trainer = mixed(wide(), arguments(tmp_path), train_dataset=scans("kind", PLACES))
    with pytest.raises(BatchMetadataError) as caught:
        trainer.train()
    assert "neither an argument of the model's `forward`" in caught.value.__notes__[0]


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    values = ITSELF | {"dMRI": "DMRI"}
    trainer = mixed(
        wide(),
        arguments(tmp_path),
        train_dataset=scans("modality", values),
        data_collator=keeping,
    )
    with pytest.raises(UnknownModalityError, match="dMRI"):
        trainer.train()


@pytest.mark.long
def test_columns_of_a_dataset_are_kept(tmp_path: Path) -> None:
    """`datasets.Dataset` loses its unused columns before anything is collated."""
    dataset: Any = importlib.import_module("datasets").Dataset  # ships no type information
    listed = [sample | {"scan": sample["scan"].tolist()} for sample in scans("modality", PLACES)]
    columns = dataset.from_list([sample for sample in listed if sample["modality"] == 0])
    assert set(columns.column_names) == {"scan", "labels", "modality", "site"}
    model = wide()
    options = {"train_dataset": columns, "eval_dataset": columns}
    trainer = mixed(model, arguments(tmp_path, **EVALUATING), **options)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.wrapper.last.active == ("T1",)
    assert model.seen == set()
