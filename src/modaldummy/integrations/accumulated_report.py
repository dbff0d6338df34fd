"""One report for a step of the optimizer, from those of all batches that it accumulates."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._core.term import term_input


class WeightedReport(NamedTuple):
    """The report of one batch.

    Attributes:
        report: What the wrapper did.
        share: The factor with which the loss of the batch enters the loss of the step.
    """

    report: StepReport
    share: float


def accumulated_report(
    wrapper: DummyLossWrapper, batches: Sequence[WeightedReport]
) -> dict[str, float]:
    """Combine the reports of all batches that are accumulated for one step.

    Losses and dummy terms are weighted sums over the batches, `fraction` is the largest of all. A
    modality is active if any batch contains it. The counts are those of the parameters that are
    inactive in all batches.

    Args:
        wrapper: The wrapper that made the reports.
        batches: One report for each batch, at least one.

    Returns:
        Numbers for a logger, under the keys of `StepReport.as_dict`.
    """
    rows = [batch.report.as_dict() for batch in batches]
    combined = dict(rows[-1])
    if len(batches) == 1 and batches[0].share == 1:
        return combined
    for name in ("modaldummy/real", "modaldummy/dummy", "modaldummy/uncapped"):
        combined[name] = sum(
            row[name] * batch.share for row, batch in zip(rows, batches, strict=True)
        )
    # NaN counts as the largest fraction.
    fractions = [row["modaldummy/fraction"] for row in rows]
    combined["modaldummy/fraction"] = max(fractions, key=lambda f: (math.isnan(f), f))
    parameters = wrapper.parameters
    trained_keys = {key for batch in batches for key in parameters.active_keys(batch.report.active)}
    trained = parameters.of_keys(trained_keys)
    inactive = [
        p for p in parameters.split(()).inactive_parameters if id(p.parameter) not in trained
    ]
    combined["modaldummy/num_params"] = float(len(inactive))
    num_elements = sum(term_input(owned).numel() for owned in inactive)
    combined["modaldummy/num_elements"] = float(num_elements)
    active = {name for batch in batches for name in batch.report.active}
    return combined | {f"modaldummy/active/{name}": 1.0 for name in active}
