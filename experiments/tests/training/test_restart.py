"""A worker is killed under torchrun, and the run ends all the same."""

import pytest
from distoptim_experiments import records
from distoptim_experiments.training import checkpoint

from distoptim.cli import application
from experiments.tests.training.killed import train_with_a_victim


def test_a_killed_worker_is_restarted_and_the_run_ends_at_its_last_step(tmp_path):
    folder, printed = train_with_a_victim(tmp_path, ranks=2, steps=11)
    record = records.read(folder)
    assert record.config.workers == 2
    assert record.summary.step == 11
    assert [line.step for line in record.logs] == list(range(1, 12))
    assert [printed[rank].count("record: ") for rank in range(2)] == [1, 0]
    assert len(list(checkpoint.latest(folder).glob("rank-*.pt"))) == 2


@pytest.mark.parametrize("arguments", [[], ["--folder", "a", "--resume", "b"]])
def test_auto_resume_wants_a_folder_and_nothing_else(arguments):
    with pytest.raises(ValueError, match="--auto-resume goes with --folder"):
        application()(["train", "--auto-resume", *arguments])
