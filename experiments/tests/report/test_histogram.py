"""The table and picture of a partition."""

from __future__ import annotations

import torch
from distoptim_experiments.report import histogram


def test_counts_are_those_of_the_shards():
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    shards = [torch.tensor([0, 1, 3]), torch.tensor([2, 4, 5])]
    assert histogram.counts(labels, shards, 4) == [[1, 1, 1, 0], [0, 1, 2, 0]]


def test_the_command_prints_the_table_and_draws(invoke, tmp_path):
    path = tmp_path / "new" / "p.png"
    options = ("--data", "synthetic", "--workers", "4", "--partition", "label-skew:1")
    code, out, err = invoke("partition", *options, "--out", path)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()[1:5]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [int(row[1 + rank]) for rank, row in enumerate(rows)] == [200] * 4
    assert [row[-1] for row in rows] == ["500"] * 4
    assert path.read_bytes().startswith(b"\x89PNG")
