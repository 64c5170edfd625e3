"""The meter's arithmetic, its stopping rule and its file."""

from __future__ import annotations

import json

import pytest
import torch

from fastgrad.errors import ResourceError
from fastgrad.meter import Meter


def test_meter_ratio_and_stopping(tmp_path):
    meter = Meter(eta=0.5, resource="flops", patience=2, window=1)
    a = torch.randn(4, 4)
    for psi in (0.0, 256.0, 300.0, 310.0):
        with meter.step():
            a @ a
        meter.check(psi)
    flops = 2 * 4**3
    assert meter.spent["flops"] == 4 * flops
    ratios = [c.gain_per["flops"] for c in meter.checks]
    assert ratios == [None, 256 / flops, 44 / flops, 10 / flops]
    assert meter.should_stop
    meter.save(tmp_path / "m.json")
    again = Meter.load(tmp_path / "m.json")
    assert again.checks == meter.checks
    assert again.should_stop
    with meter.step():
        a @ a
    meter.check(1000.0)
    assert not meter.should_stop
    assert "not measured" in meter.modes["joules"] or "RAPL" in meter.modes["joules"]


def test_meter_refuses_nonsense(tmp_path):
    with pytest.raises(ResourceError, match="finite"):
        Meter().check(float("nan"))
    with pytest.raises(ResourceError, match="not measured"):
        Meter(resource="flops", flops="off")
    (tmp_path / "m.json").write_text(json.dumps({"format": "x"}))
    with pytest.raises(ResourceError):
        Meter.load(tmp_path / "m.json")
