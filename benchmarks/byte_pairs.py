"""What a text model must beat.

Nats per byte of the test part, guessed from no, one or two bytes before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from distoptim_experiments.data import text
from distoptim_experiments.models.gpt import BYTES


def main() -> None:
    """Print the loss of counts over the training part.

    A longer context falls back on the shorter one.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plays", type=Path, help="file or folder of text")
    windows, follows, test, answers = (
        part.numpy() for part in text.load(parser.parse_args().plays)
    )
    guess: npt.NDArray[np.float64] = np.full((1, BYTES), 1 / BYTES)
    for seen in range(3):
        # A quarter of a count per byte, shared out as the shorter context guesses.
        counts = np.tile(BYTES / 4 * guess, (BYTES**seen // len(guess), 1))
        np.add.at(counts, (_before(windows, seen), follows[:, max(0, seen - 1) :]), 1)
        guess = counts / counts.sum(1, keepdims=True)
        loss = -np.log(guess[_before(test, seen), answers[:, max(0, seen - 1) :]]).mean()
        print(f"{seen} bytes before: {loss:.3f} nats per byte")


def _before(windows: npt.NDArray[np.int64], seen: int) -> npt.NDArray[np.int64]:
    """The last bytes as one number, the nearest in the lowest digit.

    Without the places that have fewer.
    """
    places = windows.shape[1] - max(0, seen - 1)
    number = np.zeros((len(windows), places), dtype=np.int64)
    for back in range(seen):
        number += BYTES**back * windows[:, seen - 1 - back : seen - 1 - back + places]
    return number


if __name__ == "__main__":
    main()
