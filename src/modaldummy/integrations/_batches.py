"""One row for a logger out of the reports of all batches that were accumulated for a step."""

import math
from collections.abc import Sequence

from modaldummy._core import DummyLossWrapper, StepReport
from modaldummy._core.term import connected_tensor


def summed(
    wrapper: DummyLossWrapper, reports: Sequence[tuple[StepReport, float]]
) -> dict[str, float]:
    """`StepReport.as_dict` of all batches that were accumulated for a step.

    Losses and dummies are added up, so that they are those of the loss of the step; active is what
    any batch held, and what is counted are the parameters that were inactive in all.

    Args:
        wrapper: Whose reports they are.
        reports: One for each batch, with its share of the loss of the step.
    """
    (last, _), rows = reports[-1], [(report.as_dict(), share) for report, share in reports]
    if len(reports) == 1 and reports[0][1] == 1:
        return rows[0][0]
    found = last.as_dict()
    for name in ("real", "dummy", "uncapped"):
        key = f"modaldummy/{name}"
        found[key] = sum(row[key] * share for row, share in rows)
    found["modaldummy/fraction"] = max(
        (row["modaldummy/fraction"] for row, _ in rows), key=lambda f: (math.isnan(f), f)
    )
    taught = {key for report, _ in reports for key in wrapper.parameters.active_keys(report.active)}
    known = wrapper.parameters.of_keys(taught)
    idle = [one for one in wrapper.parameters.split(()).parameters if id(one[1]) not in known]
    found["modaldummy/num_params"] = float(len(idle))
    found["modaldummy/num_elements"] = float(sum(connected_tensor(one).numel() for one in idle))
    active = {name for report, _ in reports for name in report.active}
    return found | {f"modaldummy/active/{name}": 1.0 for name in active}
