"""What the page on alternatives says of them is what they do, and its figures are measured."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tests.asserts import assert_same_bits
from tests.holding import Towers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/explanation/alternatives.md").read_text()
ZEROS = hasattr(FSDPModule, "set_reduce_scatter_unused_params")

# --- on one device ----------------------------------------------------------------------------


def added(line: Callable[[nn.Parameter], Tensor], *parameters: nn.Parameter) -> Tensor:
    """A loss of one, and such a line over absent parameters."""
    return torch.ones((), requires_grad=True) + sum(line(p) for p in parameters)


def zero_times_sum(parameter: nn.Parameter) -> Tensor:
    return 0.0 * parameter.sum()


def copied(parameter: nn.Parameter) -> Tensor:
    return 1e-7 * parameter.sum()


def one_element(parameter: nn.Parameter) -> Tensor:
    return 1e-7 * parameter.view(-1)[0]


def of(value: float, *size: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.full(size, value, dtype=dtype))


@pytest.mark.parametrize("line", [zero_times_sum, copied])
def test_a_single_infinite_weight_spoils_the_loss(line: Callable[[nn.Parameter], Tensor]) -> None:
    weight = of(1.0, 3)
    with torch.no_grad():
        weight[1] = torch.inf
    assert not added(line, weight).isfinite()
    assert added(one_element, weight).isfinite()


def test_86_layer_norms_in_float16_make_zero_times_their_sum_nan() -> None:
    """Together 66,048 ones, which is more than float16 can count; none of them is unusual."""
    gains = [nn.LayerNorm(768).half().weight for _ in range(86)]
    total = 0.0 * sum(gain.sum() for gain in gains)
    assert torch.as_tensor(total).isnan()
    assert torch.as_tensor(0.0 * sum(gain.sum() for gain in gains[:85])).eq(0)


def test_the_copied_line_grows_with_the_weights() -> None:
    assert added(copied, of(1.0, 1000, 1000)).item() == pytest.approx(1.1)


def test_the_copied_line_is_zero_in_float16_after_a_division_by_four() -> None:
    half = of(1.0, 3, dtype=torch.float16)
    (added(copied, half) / 4).backward()
    assert half.grad is not None
    assert not half.grad.any()


def test_one_element_has_a_whole_gradient_of_zeros_but_one() -> None:
    weight = of(1.0, 3, 4)
    added(one_element, weight).backward()
    assert weight.grad is not None
    assert weight.grad.shape == (3, 4)
    assert weight.grad.untyped_storage().nbytes() == 12 * 4
    assert weight.grad.nonzero().tolist() == [[0, 0]]


def test_one_element_fails_for_channels_last_and_for_no_elements() -> None:
    filters = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last).weight  # type: ignore[call-overload]
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        one_element(filters)
    with pytest.raises(IndexError):
        one_element(of(0.0, 0))


# --- fake inputs ------------------------------------------------------------------------------


def trained(absent: Callable[[Towers, Tensor], Tensor], steps: int = 5) -> Towers:
    """AdamW on T1, and on rsfMRI in the first step, with dMRI connected by `absent`."""
    model = Towers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        names = ["T1", "rsfMRI"] if step == 0 else ["T1"]
        absent(model, model.loss(names)).backward()
        optimizer.step()
    return model


def by_fakes(model: Towers, loss: Tensor) -> Tensor:
    fakes = [model.towers[name](torch.ones(1, 3)).mean() for name in ("rsfMRI", "dMRI")]
    return loss + 0.0 * torch.stack(fakes).sum()


def test_adamw_takes_a_fake_times_zero_for_a_gradient_of_zero() -> None:
    """Bit for bit what `scale=0.0` does: weights decay, and momentum goes on."""
    fakes, nothing = trained(by_fakes), trained(lambda _, loss: loss)
    zeros = trained(lambda model, loss: model.wrapper(0.0).total(loss, "T1"))
    for name in ("rsfMRI", "dMRI"):
        weight: Tensor = fakes.towers[name].weight
        assert_same_bits(weight, zeros.towers[name].weight, name)
        assert not torch.equal(weight, nothing.towers[name].weight)
    assert_same_bits(nothing.towers["dMRI"].weight, Towers().towers["dMRI"].weight, "dMRI")


def test_a_fake_whose_output_is_infinite_spoils_the_loss_unless_it_is_cut_away() -> None:
    output = of(3e38, 2, 2).sum()
    assert output.isinf()
    assert (torch.ones(()) + 0.0 * output).isnan()
    assert torch.cat([torch.ones(1), output[None][:0]]).sum().eq(1)


def test_a_fake_input_draws_random_numbers_where_there_is_dropout() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    nn.Dropout(0.5)(torch.zeros(1, 3))
    assert not torch.equal(torch.rand(3), expected)


def test_a_fake_that_is_taken_for_data_teaches_biases() -> None:
    tower = nn.Linear(3, 4)
    (tower(torch.zeros(2, 3)) - 1).square().mean().backward()
    assert tower.bias.grad is not None
    assert tower.bias.grad.abs().min() > 0


# --- figures ----------------------------------------------------------------------------------


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / f"benchmarks/results/{name}-cpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def table_after(words: str) -> dict[str, list[float]]:
    """Figures of the first table after these words, by contender."""
    lines = PAGE.partition(words)[2].partition("\n\n|")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: [float(cell) for cell in figures] for name, *figures in cells}


def sums(contender: str, gradients: str = "fresh") -> list[float]:
    """Times of forward plus backward over the copied line's, in the order of the page."""
    found = {
        row["shape"]: float(row["to_naive"])
        for row in rows_of("bench_sum")
        if (row["contender"], row["gradients"], row["phase"]) == (contender, gradients, "both")
    }
    return [found[shape] for shape in ("small", "vit_b", "patches")]


def steps_with_fakes(contender: str) -> list[float]:
    return [
        float(row["value"])
        for what in ("step / ours", "step / bare")
        for row in rows_of("show_alternatives")
        if (row["contender"], row["what"]) == (contender, what)
    ]


def steps_under_ddp(contender: str, ranks: str = "2") -> list[float]:
    found = {
        row["shape"]: float(row["to_find_unused"])
        for row in rows_of("bench_ddp")
        if (row["contender"], row["ranks"]) == (contender, ranks)
    }
    return [found["vit"], found["norms"]]


@pytest.mark.parametrize(
    ("words", "measured", "num_rows"),
    [("of the term alone", sums, 6), ("A step under DDP", steps_under_ddp, 5)],
)
def test_tables_are_those_of_the_results(
    words: str, measured: Callable[[str], list[float]], num_rows: int
) -> None:
    table = table_after(words)
    assert len(table) == num_rows
    for name, figures in table.items():
        assert figures == pytest.approx(measured(name), abs=0.0051), name


def test_figures_in_the_text_are_those_of_the_results() -> None:
    element, whole, nothing = (
        sums(name)[1] for name in ("one element each", "ours", "ours, gradient_only")
    )
    existing = sums("one element each", "accumulate")[2]
    line, zero, default = (sums(name)[2] for name in ("0 * sum", "ours, scale=0.0", "ours"))
    steps = [figure for ranks in "24" for figure in steps_under_ddp("ours", ranks)]
    drift = {
        (row["optimizer"], row["start"], row["dummy"]): float(row["displacement_lr"])
        for row in rows_of("bench_drift")
        if row["steps"] == "10000"
    }
    for text in (
        f"({element:.2f} against {whole:.2f} of the copied line's time",
        f"takes {nothing:.2f})",
        f"it takes {line:.2f} of the copied line's time, `scale=0.0` {zero:.2f}, our default "
        f"{default:.2f}.",
        f"({existing:.2f} for patch embeddings)",
        f"1e-7 takes {min(steps):.2f} to {max(steps):.2f} times as long",
        f"by {drift['AdamW', 'trained before', '0.0']:.1f} learning rates in 10,000 steps",
        f"Lion moves it by {drift['Lion', 'trained before', '0.0']:,.0f}.",
        f"{drift['AdamW', 'never active', '1e-7']:,.0f} in 10,000 steps for AdamW",
    ):
        assert text in " ".join(PAGE.split()), text
    level = [row for row in rows_of("bench_ddp") if row["contender"] == "ours, scale=None"]
    bounds = [(row["to_find_unused_low"], row["to_find_unused_high"]) for row in level]
    assert all(float(low) <= 1 <= float(high) for low, high in bounds)
    assert all(figure == 0 for (_, _, dummy), figure in drift.items() if dummy == "no dummy")


def test_the_table_of_fakes_is_that_of_the_results() -> None:
    table = table_after("running on fakes")
    assert len(table) == 6
    for name, figures in table.items():
        assert figures == pytest.approx(steps_with_fakes(name), abs=0.0051), name


def test_what_batch_norm_makes_of_fakes_is_that_of_the_results() -> None:
    fakes = {
        (row["what"], row["count"]): float(row["value"])
        for row in rows_of("show_alternatives")
        if row["contender"] == "fake, one sample"
    }
    mean = fakes["running mean", "10"] / fakes["running mean", "0"]
    spread = fakes["standard deviation of the output in evaluation", "100"]
    assert f"the running mean is {mean:.2f} of what it was" in " ".join(PAGE.split())
    assert f"is {spread:.0f} times as large" in " ".join(PAGE.split())
