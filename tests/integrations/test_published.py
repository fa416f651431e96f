"""What docs/checkpoints.md says of publishing a distributed checkpoint's mean as safetensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import distoptim
from distoptim.integrations.checkpoint import AveragingState, read_mean

torch_format = pytest.importorskip(
    "safetensors.torch", reason="safetensors is not installed: make test-integrations"
)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_line_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    (line,) = re.findall(r"`(save_file\(read_mean.*?)`", page)
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(3, 2)
    communicator = distoptim.comm.SingleWorker()
    optimizer = distoptim.LocalSGD(model.parameters(), lr=0.1, tau=2, communicator=communicator)
    dcp.save({"local": AveragingState(model, optimizer)}, checkpoint_id="checkpoint", no_dist=True)
    exec(line, {"save_file": torch_format.save_file, "read_mean": read_mean})
    found = torch_format.load_file("model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
