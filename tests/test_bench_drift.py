"""The drift benchmark: its figures are what the optimizers are known for, its rows are whole."""

from pathlib import Path

import pytest

import bench_drift
import plots
from bench_drift import ARMS, HOLD, NO_DUMMY, STARTS
from optimizers import OPTIMIZERS

MARKS = (1, 20)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("arm", [NO_DUMMY, "None", HOLD])
@pytest.mark.parametrize("start", STARTS)
def test_what_is_held_or_gets_no_gradient_stays(
    kind: str, arm: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_drift, "WARM_UP", 3)
    for row in bench_drift.measure((kind, arm, start), MARKS):
        assert row["displacement_lr"] == row["displacement_relative"] == 0
        assert row["state_untouched"]


def test_the_dummy_alone_moves_what_the_rules_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam by 1 / (1 + eps / 1e-7) rates a step, SGD by 1e-7, Lion by one, warm or not."""
    monkeypatch.setattr(bench_drift, "WARM_UP", 3)
    for kind, start, expected in (
        ("SGD", STARTS[0], 2e-6),
        ("Adam", STARTS[0], 20 / 1.1),
        ("Lion", STARTS[0], 20.0),
        ("Lion", STARTS[1], 20.0),
    ):
        first, last = bench_drift.measure((kind, "1e-7", start), MARKS)
        assert [first["steps"], last["steps"]] == list(MARKS)
        assert last["displacement_lr"] == pytest.approx(expected, rel=1e-3), kind
        assert last["displacement_relative"] == pytest.approx(expected * 1e-4 / 0.02, rel=0.1)
        assert last["state_untouched"] == (kind == "SGD")


def test_states_differ_by_entry_and_by_value() -> None:
    assert bench_drift.same({"step": 1}, {"step": 1})
    assert not bench_drift.same({"step": 2}, {"step": 1})
    assert not bench_drift.same({}, {"step": 1})
    assert not bench_drift.same({"step": 1}, {})


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [(kind, arm, start) for kind in ("SGD", "Adam") for arm in ARMS for start in STARTS[:1]]
    rows = [row | {"torch": ""} for job in jobs for row in bench_drift.measure(job, MARKS)]
    bench_drift.print_table(rows)
    assert "| Adam | never active | 0 | 18.2 | 0 | 0 | 0 |" in capsys.readouterr().out
    plots.draw_drift(rows, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_labels_keep_their_distance() -> None:
    heights = plots._spread({"a": 1.0, "b": 1.0, "c": 1e-5, "zero": 0.0}, gap=1)
    assert heights == pytest.approx({"a": 1.0, "b": 0.1, "c": 1e-5, "zero": 1e-9})
