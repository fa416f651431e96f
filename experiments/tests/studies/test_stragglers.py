"""Random slow-downs: the simulated rounds against theory, and who absorbs them."""

from __future__ import annotations

import numpy as np
import pytest
from distoptim_experiments.studies.stragglers import draw, expected_maximum, study

from distoptim.simulator import Pareto, ShiftedExponential

WORKERS = (2, 8)


@pytest.mark.parametrize("compute", [ShiftedExponential(0.5, 0.5), Pareto(0.5, 3.0)])
def test_waiting_for_the_slowest_is_the_expected_maximum_and_overlap_waits_less(compute, tmp_path):
    curves = {c.method: c for c in study(compute, tau=4, workers=WORKERS, rounds=100)}
    for name in ("synchronous", "Local SGD"):
        assert curves[name].simulated == pytest.approx(curves[name].closed_form, rel=0.05)
    for i in range(len(WORKERS)):
        mean = 4 * (1.0 if isinstance(compute, ShiftedExponential) else 0.75)
        order = [curves[n].simulated[i] for n in ("Overlap-Local-SGD", "Local SGD", "synchronous")]
        assert 0.97 * mean < order[0] < order[1] < order[2]
    assert curves["EASGD"].simulated == curves["Overlap-Local-SGD"].simulated
    draw({"title": list(curves.values())}, tmp_path / "picture.png", workers=WORKERS)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_expected_maximum():
    harmonic = sum(1 / k for k in range(1, 17))
    assert expected_maximum(ShiftedExponential(1.0, 2.0), 16, 1) == pytest.approx(
        1 + 2 * harmonic, rel=1e-4
    )
    assert expected_maximum(ShiftedExponential(0.0, 1.0), 1, 5) == pytest.approx(5, rel=1e-4)
    draws = 0.5 * (1 - np.random.default_rng(0).random((20000, 8))) ** (-1 / 3)
    assert expected_maximum(Pareto(0.5, 3.0), 8, 1) == pytest.approx(draws.max(1).mean(), rel=0.02)
