"""`hivemind_peer.py RANK ADDRESS FILE`: hivemind's lines of docs/coming-from.md as one peer; hivemind starts processes, which the
harness's workers may not.

Writes what it held after each local step of its own, after the step with which an epoch ended, and where.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.docs.test_coming_from import EPOCHS, batches, flat, network, pair, stepped

# Where steps took no time, an epoch would be over before the peers had seen each other.
STEP_S = 0.25


def main(rank: int, address: str, file: str) -> None:
    theirs, _ = pair("hivemind")
    model = network()
    ends: list[tuple[torch.Tensor, torch.Tensor]] = []
    names: dict[str, Any] = {}

    def loader() -> Iterator[Any]:
        for batch in batches(rank, 400):
            if len(ends) == EPOCHS:
                return
            before = flat(model)
            epoch = names["optimizer"].local_epoch
            yield batch
            time.sleep(STEP_S)
            # Peers say that they are there after their first step.
            while names["optimizer"].tracker.global_progress.num_peers < 2:
                time.sleep(STEP_S)
            if names["optimizer"].local_epoch != epoch:
                ends.append((stepped(before, batch), flat(model)))

    names |= {
        "torch": torch,
        "initial_peers": [address],
        "model": model,
        "loader": loader(),
        "loss_function": torch.nn.functional.cross_entropy,
    }
    exec(compile(theirs, "coming-from.md", "exec", dont_inherit=True), names)
    torch.save(ends, file)
    names["dht"].shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
