"""Ways to copy workers in the middle of a run, who then go on."""

from __future__ import annotations

import copy
import io
import pickle

import torch

from distoptim.testing.lockstep import Lockstep


def resumed(make, workers):
    """A fresh cluster that goes on from what `workers` put into files."""
    fresh = Lockstep(make, [[torch.zeros_like(p) for p in workers.params[0]]] * len(workers.params))
    for optimizer, params, new_optimizer, new_params in zip(
        workers.optimizers, workers.params, fresh.optimizers, fresh.params, strict=True
    ):
        file = io.BytesIO()
        torch.save(
            {"model": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file
        )
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        with torch.no_grad():
            torch._foreach_copy_(new_params, saved["model"])
        new_optimizer.load_state_dict(saved["optimizer"])
    return fresh


COPIES = {
    "state_dict": resumed,
    "pickle": lambda _, workers: pickle.loads(pickle.dumps(workers)),
    "deepcopy": lambda _, workers: copy.deepcopy(workers),
}
