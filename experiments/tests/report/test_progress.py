"""What the terminal shows of a run that is on."""

import io

import pytest
from distoptim_experiments import records
from distoptim_experiments.report.progress import LiveProgress
from rich.console import Console


@pytest.mark.parametrize(
    ("share", "tau", "shown"),
    [(0.0184, 4, "exposed  1.8% tau   4"), (None, None, "exposed       tau    ")],
)
def test_a_bar_shows_exposed_share_and_tau(share, tau, shown):
    console = Console(file=io.StringIO(), width=160)
    progress = LiveProgress(console)
    observe = progress.watch("local-sgd")
    observe(records.Log(step=8, epoch=1.0, seconds=2.0, loss=0.5, exposed_share=share, tau=tau))
    console.print(progress.get_renderable())
    text = console.file.getvalue()
    assert "loss 0.5000" in text
    assert shown in text
