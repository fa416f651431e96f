"""Files of checkpoints: whole, damaged, or without room on the disk."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from distoptim_experiments.training import checkpoint
from distoptim_experiments.training.world import Seat

from distoptim.testing.processes import run


def save(folder, step, size=10):
    state = {"x": torch.full((size,), float(step))}
    return checkpoint.save(folder, seat=Seat(), step=step, state=state, barrier=lambda: None)


def test_what_is_saved_is_loaded_and_older_ones_go(tmp_path):
    save(tmp_path, 3)
    assert save(tmp_path, 7) == checkpoint.latest(tmp_path)
    state, own = checkpoint.load(tmp_path, seat=Seat())
    assert (state["step"], own) == (7, True)
    assert state["x"].tolist() == [7.0] * 10
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).rglob("*")) == [
        "latest",
        "rank-0.pt",
        "step-7",
    ]
    checkpoint.remove(tmp_path)
    assert not checkpoint.exists(tmp_path)
    checkpoint.remove(tmp_path)


def test_at_another_size_everybody_gets_somebodys_state(tmp_path):
    for rank in range(4):
        seat = Seat(rank, workers=2, island_size=2)
        state = {"of_rank": rank}
        checkpoint.save(tmp_path, seat=seat, step=1, state=state, barrier=lambda: None)

    def found(*seats):
        loaded = [checkpoint.load(tmp_path, seat=seat) for seat in seats]
        return [(state["of_rank"], own) for state, own in loaded]

    assert found(*(Seat(rank, 2, 2) for rank in range(4))) == [(i, True) for i in range(4)]
    assert found(*(Seat(rank, 3, 2) for rank in range(6))) == [
        (i, False) for i in (0, 1, 2, 3, 0, 1)
    ]
    # Plain workers: the first rank of each island.
    assert found(Seat(0, 2), Seat(1, 2)) == [(0, True), (2, True)]


def test_an_unfinished_checkpoint_is_not_the_latest(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint there to resume from"):
        checkpoint.latest(tmp_path)
    good = tmp_path / checkpoint.FOLDER / "step-5"
    good.mkdir(parents=True)
    (good.parent / "latest").write_text("step-5")
    (good.parent / "step-9").mkdir()
    assert checkpoint.latest(tmp_path) == good


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = save(tmp_path, 5) / "rank-0.pt"
    for damage in (
        lambda: path.write_bytes(b"no"),
        lambda: path.write_bytes(b"l" * 9),
        lambda: torch.save([1], path),
        lambda: torch.save({"model": 1}, path),
    ):
        damage()
        with pytest.raises(ValueError, match="damaged") as error:
            checkpoint.load(tmp_path, seat=Seat())
        assert str(error.value) == f"{path}: damaged, not a checkpoint"
    path.unlink()
    with pytest.raises(ValueError, match=r"rank-0\.pt: cannot be read: No such file"):
        checkpoint.load(tmp_path, seat=Seat())


def save_until_killed(rank, folder, after_s):
    folder /= str(rank)
    save(folder, 1, size=200_000)
    # At another moment of a save each time.
    threading.Timer(0.0137 * (rank + 1) + after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for step in range(2, 10**6):
        save(folder, step, size=200_000)


@pytest.mark.parametrize(
    "later", [0, *(pytest.param(i, marks=pytest.mark.soak) for i in range(1, 16))]
)
def test_killed_at_any_moment_the_latest_checkpoint_is_whole(tmp_path, later):
    killed = dict.fromkeys(range(5), -signal.SIGKILL)
    run(save_until_killed, 5, tmp_path, 0.0029 * later, expect_exit=killed)
    for folder in tmp_path.iterdir():
        state, _ = checkpoint.load(folder, seat=Seat())
        assert checkpoint.latest(folder).name == f"step-{state['step']}"
        assert torch.equal(state["x"], torch.full((200_000,), float(state["step"])))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("size", [1, 10**6])
@pytest.mark.parametrize("file", ["step-2/rank-0.pt", "latest"])
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tmp_path, file, size):
    """Small states and large ones fail in different places of torch."""
    before = save(tmp_path, 1)
    path = tmp_path / checkpoint.FOLDER / file
    path.parent.mkdir(exist_ok=True)
    path.with_name(f"{path.name}-0.draft").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="cannot be written") as error:
        save(tmp_path, 2, size=size)
    assert str(error.value) == f"{path}: cannot be written: No space left on device"
    assert checkpoint.latest(tmp_path) == before
    assert checkpoint.load(tmp_path, seat=Seat())[0]["step"] == 1


def test_half_a_draft_takes_no_room(tmp_path, monkeypatch):
    def half(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(ValueError, match="No space left on device"):
        save(tmp_path, 1)
    assert not [p for p in Path(tmp_path).rglob("*") if p.is_file()]
