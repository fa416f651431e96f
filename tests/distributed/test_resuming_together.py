"""Workers that load what does not belong together: one error on all, naming both sides, and all train on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import distoptim
from distoptim.engine import checkpoint
from distoptim.testing.processes import run
from tests.helpers.real import parameters, train

TAU, WORKERS = 3, 3


def _exchanged(state):
    """Everybody's."""
    out = [None] * WORKERS
    torch.distributed.all_gather_object(out, state)
    return out


def _cases(rank):
    params = parameters(0, (40, 40), (8,))
    feedback = distoptim.OverlapLocalSGD(params, lr=0.1, tau=TAU, codec="int8+ef")
    train(feedback, params, 2 * TAU, rank)
    files = _exchanged(copy.deepcopy(feedback.state_dict()))
    with pytest.raises(
        ValueError, match=r"rank 0 loads the state of rank 1, in which is what that worker's codes"
    ):
        feedback.load_state_dict(files[(rank + 1) % WORKERS])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        feedback.load_state_dict(copy.deepcopy(files[0]))
    assert [str(w.message) for w in told] == [
        "all 3 workers load the state of rank 0: the others' own parts, and what their codes have lost, "
        "are dropped"
    ]
    assert told[0].filename == __file__
    train(feedback, params, TAU, rank)
    feedback.close()

    params = parameters(0)
    plain = distoptim.OverlapLocalSGD(params, lr=0.1, tau=TAU)
    train(plain, params, 2 * TAU, rank)
    saved = copy.deepcopy(plain.state_dict())
    files = _exchanged(saved)
    plain.load_state_dict(files[(rank + 1) % WORKERS])
    plain.load_state_dict(saved)
    # One wrong number in the anchor of one worker, in a file that says it is whole.
    other = copy.deepcopy(saved)
    other["distoptim"]["fragments"][0]["state"]["anchor"][0] += rank == 1
    with pytest.raises(
        ValueError, match=r"disagree on anchor of fragment 0: rank 0 has \w{8}, rank 1 has \w{8}"
    ):
        plain.load_state_dict(checkpoint.sealed(other))
    # A file that is damaged on one worker.
    other = copy.deepcopy(saved)
    other["param_groups"][0]["lr"] += rank == 2
    with pytest.raises(ValueError, match=r"checkpoint is damaged") as error:
        plain.load_state_dict(other)
    assert str(error.value).startswith("rank 2 cannot load its state: ") == (rank != 2)
    train(plain, params, TAU, rank)
    plain.close()


def test_files_that_do_not_belong_together():
    run(_cases, WORKERS)
