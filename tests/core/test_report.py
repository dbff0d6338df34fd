"""What a step reports."""

import json
import math

import pytest
import torch

from tests.asserts import last_report
from tests.zoo import brain

REAL = torch.tensor(2.0)


def test_a_report_says_what_happened() -> None:
    """In map order, and as numbers that are ready for a logger."""
    case = brain()
    wrapper = case.wrapper(1e-3)
    assert wrapper.last is None
    wrapper.total(REAL, ["T1", "rsfMRI"])
    report = last_report(wrapper)
    assert (report.active, report.inactive) == (("T1", "rsfMRI"), ("dMRI",))
    inactive = case.inactive({"T1", "rsfMRI"})
    assert report.num_params == len(inactive)
    assert report.num_elements == sum(p.numel() for p in inactive.values())
    logged = report.as_dict()
    assert json.loads(json.dumps(logged)) == logged
    names = ["real", "dummy", "uncapped", "fraction", "num_params", "num_elements"]
    flags = {"active/T1": 1, "active/dMRI": 0, "active/rsfMRI": 1}
    assert list(logged) == [f"modaldummy/{name}" for name in [*names, *flags]]
    assert logged["modaldummy/fraction"] == report.fraction == abs(report.dummy.item()) / 2
    assert {name: logged[f"modaldummy/{name}"] for name in flags} == flags
    wrapper.total(REAL, [])
    assert list(last_report(wrapper).as_dict()) == list(logged)
    with pytest.raises(AttributeError):
        report.active = ()  # type: ignore[misc]


def test_the_report_of_a_dummy_alone_has_no_real_loss() -> None:
    wrapper = brain().wrapper()
    dummy = wrapper.dummy("T1")
    report = last_report(wrapper)
    assert dummy.shape == ()
    assert report.dummy == report.uncapped == dummy
    assert report.real.isnan()
    assert math.isnan(report.fraction)


def test_the_fraction_of_a_zero_loss() -> None:
    """Zero with the cap, which lets nothing through; infinite without it."""
    for max_fraction, fraction in ((1e-4, 0), (None, math.inf)):
        wrapper = brain().wrapper(1.0, max_fraction=max_fraction)
        wrapper.total(torch.tensor(0.0), "T1")
        assert last_report(wrapper).fraction == fraction
