"""Cost of the dummy term beside what people write instead, and beside the least it could cost.

Every contender adds something to the same loss that gives all parameters a gradient. They take
turns within one run, so that a noisy machine disturbs all alike: compare the ratios, not the times.
`limit` is one sum over a flat buffer of as many bytes and one fill; `limit, fill each` fills as
many tensors as there are parameters.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from measure import (
    Contender,
    Times,
    Work,
    clear,
    copy_bandwidth,
    environment,
    keep_memory,
    percentiles,
    pick_device,
    print_environment,
    ratio,
    result_path,
    take_turns,
    work,
    write_csv,
)
from modaldummy import DummyLossWrapper
from modaldummy._core.reduce import fused_kernels
from shapes import SHAPES, USUAL

SCALE = 1e-7
MODES = ("fresh", "accumulate")
# Settings that have no use for the values of the parameters, or that hand out no gradient.
READ_NOTHING = ("one element each", "ours, gradient_only", "ours, scale=0.0", "ours, scale=None")
WRITE_NOTHING = ("ours, scale=None",)
# Compiling a loop takes about 0.1 s a tensor on two cores.
MOST_COMPILED = 400


def main() -> None:
    """Measure the shapes that were asked for, and print, write and draw what was found."""
    arguments = _parser().parse_args()
    keep_memory()
    device = pick_device(arguments.device)
    bandwidth = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        torch.manual_seed(0)
        tower = SHAPES[shape]().to(device, getattr(torch, arguments.dtype))
        for mode in arguments.modes:
            print(f"measuring {shape}, {mode} gradients ...", file=sys.stderr)
            found = measure(tower, mode, arguments.seconds, not arguments.no_compile)
            rows += table_rows(shape, mode, tower, found, bandwidth)
            if arguments.csv is not None:  # each time, for the case that this run is cut short
                write_csv(result_path(arguments.csv, "bench_sum.csv", device), rows)
        del tower, found
    if arguments.json:
        print(json.dumps(rows))
    else:
        print_tables(rows)
    if arguments.plot is not None:
        from plots import draw_sums

        draw_sums(rows, result_path(arguments.plot, "bench_sum.png", device))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=USUAL, metavar="SHAPE")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16", "float64"), default="float32"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=MODES, help="whether gradients exist already"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="for each shape and mode")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", action="store_true", help="print rows, not tables")
    for name in ("csv", "plot"):
        parser.add_argument(
            f"--{name}", nargs="?", const="", help="write it, by default to benchmarks/results"
        )
    return parser


def measure(
    tower: nn.Module, mode: str, seconds: float, compiled: bool
) -> dict[str, tuple[Times, Work]]:
    """Times and work of each contender over the parameters of `tower`."""
    params = list(tower.parameters())
    clear(params)
    device = params[0].device
    entrants = contenders(tower, mode, compiled and len(params) <= MOST_COMPILED)
    once = sum(float(times.both.sum()) for times in take_turns(entrants, 1, device).values())
    rounds = int(min(max(seconds / (2 * once), 5), 100))
    times = take_turns(entrants, rounds, device)
    return {name: (times[name], work(entrants[name], device)) for name in entrants}


def contenders(tower: nn.Module, mode: str, compiled: bool) -> dict[str, Contender]:
    """All that is compared, by name; `mode` says whether gradients exist already."""
    params = list(tower.parameters())
    real = torch.ones((), device=params[0].device, requires_grad=True)

    def fresh() -> None:
        clear([*params, real])

    def existing() -> None:
        for param in params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)

    reset = fresh if mode == "fresh" else existing

    def through_autograd(forward: Callable[[], Tensor]) -> Contender:
        return Contender(forward, Tensor.backward, reset)

    def naive() -> Tensor:
        dummy = torch.zeros((), device=real.device, requires_grad=True)
        for param in params:
            dummy = dummy + param.sum() * SCALE
        return real + dummy

    found = {"naive loop": through_autograd(naive)}
    if compiled:
        torch.compiler.reset()
        found["naive loop, compiled"] = through_autograd(torch.compile(naive))
    found["0 * sum"] = through_autograd(lambda: real + 0.0 * sum(p.sum() for p in params))
    found["stack(sum)"] = through_autograd(
        lambda: real + torch.stack([p.sum() for p in params]).sum() * SCALE
    )
    found["one element each"] = through_autograd(
        lambda: real + SCALE * sum(p.reshape(-1)[0] for p in params)
    )
    found |= {name: through_autograd(term) for name, term in ours(tower, real).items()}
    plain = [param.detach() for param in params]
    found["_foreach_norm"] = Contender(lambda: torch._foreach_norm(plain), None, fresh)
    return found | limits(params, mode, fresh)


def ours(tower: nn.Module, real: Tensor) -> dict[str, Callable[[], Tensor]]:
    """`DummyLossWrapper.total` in each setting: lookup, cap and report are part of it."""
    model = nn.ModuleDict({"here": nn.Linear(1, 1), "gone": tower})
    spec = {"here": "here", "gone": "gone"}
    settings: dict[str, dict[str, Any]] = {
        "ours": {"scale": SCALE},
        "ours, gradient_only": {"scale": SCALE, "gradient_only": True},
        "ours, scale=0.0": {"scale": 0.0},
        "ours, scale=None": {"scale": None},
    }
    wrappers = {name: DummyLossWrapper(model, spec, **chosen) for name, chosen in settings.items()}

    def term(wrapper: DummyLossWrapper, kernels: str) -> Callable[[], Tensor]:
        def total() -> Tensor:
            os.environ["MODALDUMMY_REDUCTIONS"] = kernels
            return wrapper.total(real, ["here"])

        return total

    terms = {name: term(wrapper, "torch") for name, wrapper in wrappers.items()}
    if real.is_cuda and fused_kernels() is not None:
        terms["ours, fused kernels"] = term(wrappers["ours"], "triton")
    return terms


def limits(
    params: list[nn.Parameter], mode: str, reset: Callable[[], None]
) -> dict[str, Contender]:
    """One sum over as many bytes, and one fill, or as many fills as there are parameters."""
    flat = torch.cat([param.detach().reshape(-1) for param in params])
    number = torch.full((), SCALE, dtype=flat.dtype, device=flat.device)
    if mode == "fresh":

        def one(_: Any) -> Any:
            return torch.empty_like(flat).fill_(number)

        def each(_: Any) -> Any:
            return [torch.empty_like(param).fill_(number) for param in params]

    else:
        gradient = torch.zeros_like(flat)
        gradients = gradient.split([param.numel() for param in params])

        def one(_: Any) -> Any:
            return gradient.add_(number)

        def each(_: Any) -> Any:
            return [own.add_(number) for own in gradients]

    return {
        "limit, fill each": Contender(flat.sum, torch.no_grad()(each), reset),
        "limit": Contender(flat.sum, torch.no_grad()(one), reset),
    }


def table_rows(
    shape: str,
    mode: str,
    tower: nn.Module,
    found: dict[str, tuple[Times, Work]],
    bandwidth: float,
) -> list[dict[str, Any]]:
    """One row for each contender and phase."""
    params = list(tower.parameters())
    size = sum(param.nbytes for param in params)
    facts = {
        "tensors": len(params),
        "elements": sum(param.numel() for param in params),
        "dtype": str(params[0].dtype).removeprefix("torch."),
        "copy_GB_per_s": bandwidth / 1e9,
    } | environment(params[0].device)
    rows = []
    for name, (times, done) in found.items():
        moved = {"forward": 0 if name in READ_NOTHING else size}
        if times.backward.any():
            written = size if mode == "fresh" else 2 * size
            moved["backward"] = 0 if name in WRITE_NOTHING else written
            moved["both"] = moved["forward"] + moved["backward"]
        for phase, volume in moved.items():
            figures = percentiles(getattr(times, phase))
            speed = volume / (figures["p50_ms"] / 1e3)
            rows.append(
                {"shape": shape, "gradients": mode, "contender": name, "phase": phase}
                | figures
                | {
                    "rounds": len(times.forward),
                    "to_limit": ratio(times, found["limit"][0], phase),
                    "to_naive": ratio(times, found["naive loop"][0], phase),
                    "share_of_copy": speed / bandwidth if volume else None,
                    "operators": done.operators,
                    "launches": done.launches,
                    "peak_MB": done.peak_bytes / 1e6,
                }
                | facts
            )
    return rows


def print_tables(rows: list[dict[str, Any]]) -> None:
    """A table for each shape and mode: median times, and ratios of forward plus backward."""
    first = rows[0]
    print_environment(first)
    print(f"{first['dtype']}; a copy reads and writes {first['copy_GB_per_s']:.1f} GB/s")
    for shape, mode in dict.fromkeys((row["shape"], row["gradients"]) for row in rows):
        own = [row for row in rows if (row["shape"], row["gradients"]) == (shape, mode)]
        size = f"{own[0]['tensors']:,} tensors, {own[0]['elements']:,} elements"
        print(f"\n{shape}: {size}, {mode} gradients")
        print(
            f"{'':22}{'forward':>9}{'backward':>9}{'both':>9}{'/ limit':>10}{'/ naive':>8}", end=""
        )
        print(f"{'% copy':>8}{'calls':>8}{'peak MB':>9}")
        for name in dict.fromkeys(row["contender"] for row in own):
            _print_row(name, {row["phase"]: row for row in own if row["contender"] == name})
    print("\ntimes: median, in ms; calls: kernel launches, or on a CPU operators of torch")
    print("% copy: bytes that it has to move, over time, as a share of what a large copy moves")


def _print_row(name: str, by_phase: dict[str, dict[str, Any]]) -> None:
    phases = ("forward", "backward", "both")
    times = [f"{by_phase[p]['p50_ms']:9.2f}" if p in by_phase else f"{'-':>9}" for p in phases]
    row = by_phase.get("both", by_phase["forward"])
    calls = row["operators"] if row["launches"] is None else row["launches"]
    print(f"{name:22}", *times, f"{row['to_limit']:10.2f}{row['to_naive']:8.2f}", sep="", end="")
    share = f"{'-':>8}" if row["share_of_copy"] is None else f"{row['share_of_copy']:8.0%}"
    print(f"{share}{calls:8,}{row['peak_MB']:9.1f}")


if __name__ == "__main__":
    main()
