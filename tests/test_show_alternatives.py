"""What is shown of fake inputs: contenders connect as they are said to, and rows are whole."""

import pytest
import torch

import bench_step
import show_alternatives

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_fake_replaces_what_batch_norm_has_seen() -> None:
    """With a momentum of 0.1, and only there."""
    rows = show_alternatives.statistics(torch.device("cpu"))
    found = {(r["what"], r["contender"], r["count"]): r["value"] for r in rows}
    for what in ("running mean", "running variance"):
        begin = found[what, "fake, one sample", 0]
        assert found[what, "fake, one sample", 10] == pytest.approx(begin * 0.9**10, rel=1e-3)
        assert found[what, "ours", 100] == begin
    spread = "standard deviation of the output in evaluation"
    assert found[spread, "fake, one sample", 0] == pytest.approx(1, abs=0.01)
    assert found[spread, "fake, one sample", 100] == pytest.approx(190, rel=0.01)
    assert found[spread, "ours", 100] == found[spread, "ours", 0]


@pytest.mark.parametrize("name", ["fake, one sample", "fake, whole batch", "empty batch"])
def test_fakes_leave_gradients_of_zero_and_the_loss_as_it_is(name: str) -> None:
    number = {"fake, one sample": 1, "fake, whole batch": 2, "empty batch": 0}[name]
    model = bench_step.Model(8)
    add = show_alternatives.fake(number)(model, torch.optim.SGD(model.parameters()))
    loss = torch.ones((), requires_grad=True)
    total = add(loss, {"T1": torch.ones(2, 64, 512)})
    total.backward()
    assert total == loss
    for tower, connected in {"T1": False, "rsfMRI": True, "dMRI": True}.items():
        for parameter in model.towers[tower].parameters():
            assert (parameter.grad is not None) == connected
            assert parameter.grad is None or not parameter.grad.any()


def test_the_script_measures_every_contender() -> None:
    rows = show_alternatives.steps(8, 2, 1, torch.device("cpu"))
    entrants = show_alternatives.entrants(8, 2, torch.device("cpu"))
    assert [row["contender"] for row in rows] == [name for name in entrants for _ in range(3)]
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
