"""What watching costs: norms of all gradients in one pass, beside the loop that everybody writes.

`loop` is `{name: p.grad.norm().item() ...}` over `named_parameters`; `foreach` is what a careful
user would write, one call of `torch._foreach_norm` and one copy to the host. All give one number a
parameter under its name; `gradient_norms` adds labels, one norm a modality and the ratio, and
`missing_gradients` says nothing where nothing is wrong. `host_waits` counts copies to the host.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from measure import (
    Contender,
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
from modaldummy import DummyLossWrapper, gradient_norms, missing_gradients
from shapes import SHAPES, tensors

CASES: dict[str, Callable[[], nn.Module]] = {
    "1,000 x (16,)": lambda: tensors([16] * 1000),
    "1,000 x (256,)": lambda: tensors([256] * 1000),
    "1,000 x (768,)": SHAPES["grow_1000"],
    "the same in LayerNorms": lambda: nn.Sequential(*(nn.LayerNorm(768) for _ in range(500))),
    "1,000 LoRA factors": SHAPES["lora"],
    "ViT-B": SHAPES["vit_b"],
}
WAYS = ("numpy", "tolist", "item", "cpu")


def main() -> None:
    """Measure all cases, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", action="store_true", help="print rows, not a table")
    parser.add_argument(
        "--csv", nargs="?", const="", help="write it, by default to benchmarks/results"
    )
    arguments = parser.parse_args()
    keep_memory()
    device = pick_device(arguments.device)
    rows = [row for case in arguments.cases for row in measure(case, arguments.rounds, device)]
    print(json.dumps(rows)) if arguments.json else print_table(rows)
    if arguments.csv is not None:
        write_csv(result_path(arguments.csv, "bench_monitor.csv", device), rows)


def measure(case: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for each contender."""
    entrants = contenders(CASES[case]().to(device))
    times = take_turns(entrants, rounds, device)
    return [
        {
            "contender": name,
            "case": case,
            **percentiles(times[name].forward),
            "to_loop": ratio(times[name], times["loop"], "forward"),
            "host_waits": host_waits(entrant),
            "launches": work(entrant, device).launches,
            **environment(device),
        }
        for name, entrant in entrants.items()
    ]


def contenders(tower: nn.Module) -> Mapping[str, Contender]:
    """Ways to bring the norms of the tower's gradients to the host, which it has."""
    model = nn.ModuleDict({"T1": tower, "dMRI": nn.Linear(2, 2)}).to(
        next(tower.parameters()).device
    )
    wrapper = DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    # What the last loss said, without one.
    wrapper.dummy(["T1"])

    def loop() -> dict[str, float]:
        named = model.named_parameters()
        return {f"grad/{n}": p.grad.norm().item() for n, p in named if p.grad is not None}

    def foreach() -> dict[str, float]:
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values()))).tolist()
        return {f"grad/{name}": norm for name, norm in zip(gradients, norms, strict=True)}

    ways: dict[str, Callable[[], Any]] = {
        "loop": loop,
        "foreach": foreach,
        "gradient_norms": lambda: gradient_norms(wrapper),
        "gradient_norms, label=False": lambda: gradient_norms(wrapper, label=False),
        "missing_gradients": lambda: missing_gradients(wrapper),
    }
    return {name: Contender(way, None, lambda: None) for name, way in ways.items()}


def host_waits(contender: Contender) -> int:
    """How often one call asks for numbers on the host."""
    count = 0

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def ask(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        return patch.object(Tensor, name, ask)

    patches = [counted(name) for name in WAYS]
    for one in patches:
        one.start()
    contender.forward()
    for one in patches:
        one.stop()
    return count


def print_table(rows: list[dict[str, Any]]) -> None:
    """Milliseconds, and how many times faster than the loop."""
    print_environment(rows[0])
    print("\n| case | contender | ms (p50) | times the loop's speed | host waits |")
    print("|---|---|---|---|---|")
    for row in rows:
        speed = f"{1 / row['to_loop']:.2g}"
        print(
            f"| {row['case']} | {row['contender']} | {row['p50_ms']:.2f} | {speed} | "
            f"{row['host_waits']} |"
        )


if __name__ == "__main__":
    main()
