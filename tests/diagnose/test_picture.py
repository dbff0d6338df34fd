"""The picture of a run shows what was logged, and where findings begin."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from modaldummy._diagnose.diagnose import examine
from modaldummy._diagnose.picture import _running_median, draw
from tests.diagnose.test_doctor import LATER, SINGLES, rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """All words in the picture of a history."""
    figures: list[Any] = []
    save = Figure.savefig

    def keep(figure: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    def drawn(history: Any) -> str:
        draw(examine(history), "A title", tmp_path / "run.png")
        assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
        return "\n".join(text.get_text() for text in figures[-1].findobj(Text))

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "SGD",
            ["A title", "Nothing wrong was found.", "dMRI inactive", "several", "bound 0.0001"],
        ),
        (LATER, ["MD202", "MD202: The loss becomes NaN or infinite at step 60.", "not finite"]),
        (SINGLES, ["MD213", "inactive, no gradient"]),
        ("scale 0 by mistake", ["MD211", "inactive, zero"]),
        ("NaN in a gradient", ["MD221", "MD204", "active, NaN or infinite"]),
        ("a fusion", ["T1-dMRI active", "T1-dMRI inactive"]),
        ("six modalities", ["f active", "a inactive"]),
    ],
)
def test_what_a_picture_says(words: Any, name: str, expected: list[str]) -> None:
    shown = words(rows(name))
    assert [word for word in expected if word not in shown] == []


def test_a_finding_is_marked_where_it_begins(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all panels. What is only information is not marked."""
    marked: list[float] = []
    monkeypatch.setattr(Axes, "axvline", lambda axes, x, **_: marked.append(x))
    words(rows(LATER))
    assert marked == [60, 60, 60]
    marked.clear()
    assert "MD226: 100% of batches" in words(rows("one modality at a time"))
    assert marked == []


def test_a_picture_of_labels_alone(words: Any) -> None:
    """As in the dashboards that this library comes from: nothing but labelled parameters."""
    kept = ("step", "loss", "grad/[")
    records = [{k: v for k, v in row.items() if k.startswith(kept)} for row in rows("SGD")]
    shown = words(records).split("\n")
    assert {"T1 active", "inactive"} <= {*shown}
    assert "|dummy| / |real|" not in shown


@pytest.mark.parametrize(
    "losses", [[10.0 ** (3 - step / 10) for step in range(80)], [-1.0, -2.0], [math.nan]]
)
def test_a_picture_of_a_loss_alone(words: Any, losses: list[float]) -> None:
    """It may fall by orders of magnitude, be negative, or not be finite."""
    words([{"step": step, "loss": loss} for step, loss in enumerate(losses)])


def test_a_running_median_goes_along_with_its_values() -> None:
    """It neither lags behind a loss that falls nor follows a single value."""
    falling = np.arange(40.0)[::-1]
    assert _running_median(falling).tolist() == falling.tolist()
    falling[20] = 1000
    assert _running_median(falling).max() < 40
