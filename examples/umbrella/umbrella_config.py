"""The configuration of a run: a YAML file, and values that the command line sets instead."""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from umbrella_scans import MODALITIES


class ConfigError(ValueError):
    """A configuration is wrong; the message says what to write instead."""


@dataclass(frozen=True)
class Config:
    """The configuration of a run.

    Attributes:
        modalities: The modalities that batches contain.
        out: Folder of the log, of checkpoints and of generated text.
        towers: The modalities that the model has a patch embedding for. Those that are not in
            `modalities` are never active.
        mixed_share: Share of batches with several modalities.
        steps: Number of optimizer steps.
        batch_size: Number of samples per batch and rank.
        learning_rate: Learning rate of AdamW.
        hold: Whether AdamW leaves parameters unchanged that no batch has trained.
        scale: Scale of the wrapper.
        seed: Seed of weights and batches.
        generate_every: Number of steps between generated texts.
        save_every: Number of steps between checkpoints.
        report_to: Logger that the Trainer uses in addition, such as `wandb` or `tensorboard`.
    """

    modalities: tuple[str, ...]
    out: str
    towers: tuple[str, ...] = MODALITIES
    mixed_share: float = 0.5
    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 1e-3
    hold: bool = True
    scale: float = 1e-7
    seed: int = 0
    generate_every: int = 50
    save_every: int = 100
    report_to: str = "none"

    def __post_init__(self) -> None:
        self._check_modalities()
        self._check_ranges()
        if not self.out:
            raise ConfigError("`out` must be a folder, got ''.")
        if self.mixed_share and self.batch_size < len(self.modalities):
            raise ConfigError(
                f"`batch_size` must be at least {len(self.modalities)}, one sample of each of "
                f"`modalities`, got {self.batch_size}."
            )

    def _check_modalities(self) -> None:
        for name in ("modalities", "towers"):
            _check_names(name, getattr(self, name))
        if without := [name for name in self.modalities if name not in self.towers]:
            raise ConfigError(f"`towers` lacks {without}, which `modalities` has.")

    def _check_ranges(self) -> None:
        if not 0 <= self.mixed_share <= 1:
            raise ConfigError(f"`mixed_share` must be from 0 to 1, got {self.mixed_share}.")
        for name in ("steps", "batch_size", "generate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"`{name}` must be a number above 0, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"`seed` must be from 0 to 2**32 - 1, got {self.seed}.")


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration from a YAML file.

    Args:
        path: The file.
        overrides: Such as `"steps=50"`; they replace values of the file.

    Raises:
        ConfigError: A key is unknown or missing, or a value is not valid.
        OSError: The file cannot be read.
    """
    given = _mapping(path.read_text(encoding="utf-8"), str(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value such as steps=50, got {text!r}.")
        given |= {key.strip(): _yaml(value, f"--set {text}")}
    known = {field.name: field for field in fields(Config)}
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"There is no key {key!r}; {hint}There are: {', '.join(known)}.")
    if missing := [name for name in ("modalities", "out") if name not in given]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}.")
    return Config(**{key: _value(key, value, known[key].type) for key, value in given.items()})


def _mapping(text: str, where: str) -> dict[Any, Any]:
    content = _yaml(text, where)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where} must contain keys and values, got {content!r}.")
    return dict(content)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _value(key: str, value: Any, expected_type: Any) -> Any:
    """Convert a value to the type of its field."""
    if expected_type == tuple[str, ...]:
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
    elif expected_type is float:
        if isinstance(value, str):  # YAML reads 3e-3 as text, because it has no decimal point
            value = _float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif type(value) is expected_type:
        return value
    expected = (
        "a list of names"
        if expected_type == tuple[str, ...]
        else f"of type {expected_type.__name__}"
    )
    raise ConfigError(f"`{key}` must be {expected}, got {value!r}.")


def _float(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _check_names(key: str, names: tuple[str, ...]) -> None:
    if not names or len(set(names)) < len(names) or not set(names) <= set(MODALITIES):
        raise ConfigError(
            f"`{key}` must name some of {', '.join(MODALITIES)}, each once, got {list(names)}."
        )
