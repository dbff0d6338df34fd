"""Which inputs of the Trainer reach the wrapper, and which reach the model."""

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
from modaldummy import BatchMetadataError, DummyLossWrapper
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
    """Recognizes a scan by its width, and keeps the names of all other arguments."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.seen: set[str] = set()

    def forward(  # type: ignore[override]
        self, scan: Tensor, labels: Tensor | None = None, **others: Any
    ) -> dict[str, Tensor]:
        self.seen |= set(others) - {"num_items_in_batch"}
        (name,) = (name for name, width in WIDTHS.items() if width == scan.shape[1])
        return super().forward(**{name: scan}, labels=labels)


class Asking(Wide):
    """Names the metadata as an argument."""

    def forward(  # type: ignore[override]
        self, scan: Tensor, labels: Tensor | None = None, modality: Any = None, **others: Any
    ) -> dict[str, Tensor]:
        return super().forward(scan, labels, **({} if modality is None else {"modality": modality}))


def scans(key: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    """Samples whose modality stands in the column `key` alone."""
    found = []
    for place, name in enumerate(ORDER):
        draw = torch.Generator().manual_seed(place)
        for _ in range(BATCH):
            scan = torch.randn(WIDTHS[name], generator=draw)
            found.append({"scan": scan, "labels": 0.5, key: values[name], "site": "A"})
    return found


def keeping(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The default collation, which drops strings, and lists of strings."""
    batch: dict[str, Any] = default_data_collator(list(samples))
    texts = [key for key, value in samples[0].items() if isinstance(value, str)]
    return batch | {key: [sample[key] for sample in samples] for key in texts}


def check_steps(seen: Recorder) -> None:
    """Inactive modalities, and no others, have dummy gradients at each step."""
    assert len(seen.steps) == len(ORDER)
    for step, active in zip(seen.steps, ORDER, strict=True):
        for name, gradient in step.items():
            assert gradient is not None
            inactive = owner_of(name) not in (None, active)
            assert (gradient.abs().max() < 1e-6) == inactive, name


ITSELF = {name: name for name in NAMES}
PLACES = {name: place for place, name in enumerate(NAMES)}
MASKS = {name: [name == other for other in NAMES] for name in NAMES}
# Column, its values, options of the Trainer, and arguments of the run.
COLUMNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "strings": ("modality", ITSELF, {"data_collator": keeping}, {}),
    "integers": ("modality", PLACES, {}, {}),
    "columns that are not removed": ("modality", PLACES, {}, {"remove_unused_columns": False}),
    "a mask": ("modalities", MASKS, {}, {}),
    "a column of another name": (
        "kind",
        ITSELF,
        {"data_collator": keeping, "metadata_columns": "kind"},
        {},
    ),
    "several columns": (
        "kind",
        ITSELF,
        {"data_collator": keeping, "metadata_columns": ["site", "kind"]},
        {},
    ),
}


@pytest.mark.parametrize(
    ("column", "values", "options", "args"), COLUMNS.values(), ids=COLUMNS.keys()
)
def test_a_column_with_the_modality_does_not_reach_the_model(
    column: str, values: Any, options: dict[str, Any], args: dict[str, Any], tmp_path: Path
) -> None:
    """In training, in evaluation within it, and in prediction."""
    model, seen = Wide(), Recorder()
    resolver = (lambda batch: batch["kind"]) if column == "kind" else None
    wrapper = DummyLossWrapper(model, MAP, resolver=resolver)
    data = scans(column, values)
    run = arguments(tmp_path, **EVALUATING, **args)
    options = options | {"train_dataset": data, "eval_dataset": data, "wrapper": wrapper}
    trainer = mixed(model, run, callbacks=[seen], **options)
    trainer.train()
    trainer.predict(data)
    check_steps(seen)
    assert model.seen == set()


class WithColumns(MixedTrainer):
    """Sets its columns itself, as Trainers do that prepare a dataset."""

    def _set_signature_columns_if_needed(self) -> None:
        columns: Any = ["scan", "labels", "modality"]
        self._signature_columns = columns


@pytest.mark.parametrize("kind", [MixedTrainer, WithColumns])
@pytest.mark.parametrize(("make", "names"), [(Wide, set()), (Asking, {"modality"})])
def test_a_model_gets_the_metadata_if_its_forward_names_it(
    make: type[Wide], names: set[str], kind: type[Any], tmp_path: Path
) -> None:
    model, seen = make(), Recorder()
    options = {"train_dataset": scans("modality", ITSELF), "data_collator": keeping}
    mixed(model, arguments(tmp_path), kind, callbacks=[seen], **options).train()
    check_steps(seen)
    assert model.seen == names


@pytest.mark.parametrize(("column", "values"), [("modality", ITSELF), ("kind", PLACES)])
def test_an_error_about_lost_metadata_names_the_collator_and_the_columns(
    column: str, values: dict[str, Any], tmp_path: Path
) -> None:
    """The default collator drops strings, and the Trainer drops unknown columns."""
    trainer = mixed(Wide(), arguments(tmp_path), train_dataset=scans(column, values))
    with pytest.raises(BatchMetadataError) as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    assert "`data_collator`" in note
    assert "`metadata_columns`" in note


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_shard_check_the_ranks_before_forward(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate has neither engine on a CPU, so that this test only pretends that it has one."""
    model = scanner()
    trainer = mixed(model, arguments(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    checked = []

    def check(*given: Any, **named: Any) -> None:
        checked.append((given, named))
        raise BatchMetadataError("of another rank")

    monkeypatch.setattr(integration, "check_ranks", check)
    trainer.compute_loss(model, batch)
    assert checked == []
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType[engine])
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(BatchMetadataError) as caught:
        trainer.compute_loss(model, batch)
    assert checked == [((trainer.wrapper, batch), {"model": model})]
    assert caught.value.__notes__


@pytest.mark.long
def test_the_metadata_column_of_a_dataset_is_kept(tmp_path: Path) -> None:
    """`datasets.Dataset` loses its unused columns before anything is collated."""
    dataset: Any = importlib.import_module("datasets").Dataset
    listed = [sample | {"scan": sample["scan"].tolist()} for sample in scans("modality", PLACES)]
    columns = dataset.from_list([sample for sample in listed if sample["modality"] == 0])
    model = Wide()
    trainer = mixed(model, arguments(tmp_path), train_dataset=columns)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.wrapper.last.active == ("T1",)
    assert model.seen == set()
