"""Random slow-downs: the simulated rounds against theory, and who absorbs them."""

from __future__ import annotations

import pytest
from distoptim_experiments.studies.stragglers import draw, study

from distoptim.simulator import Pareto, ShiftedExponential

WORKERS = (2, 16)


@pytest.mark.parametrize("compute", [ShiftedExponential(0.5, 0.5), Pareto(0.5, 3.0)])
def test_waiting_for_the_slowest_is_the_expected_maximum_and_overlap_waits_less(compute, tmp_path):
    curves = {c.method: c for c in study(compute, tau=4, workers=WORKERS, rounds=150)}
    for name in ("synchronous", "Local SGD"):
        assert curves[name].simulated == pytest.approx(curves[name].closed_form, rel=0.05)
    for i in range(len(WORKERS)):
        mean = 4 * (1.0 if isinstance(compute, ShiftedExponential) else 0.75)
        order = [curves[n].simulated[i] for n in ("Overlap-Local-SGD", "Local SGD", "synchronous")]
        assert 0.97 * mean < order[0] < order[1] < order[2]
    assert curves["EASGD"].simulated == curves["Overlap-Local-SGD"].simulated
    draw({"title": list(curves.values())}, tmp_path / "picture.png", workers=WORKERS)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
