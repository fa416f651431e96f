"""torch's distributed checkpoint: every worker goes on bit-equal, and others from the anchor or the mean."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

import distoptim
from distoptim.integrations.checkpoint import AveragingState, read_mean
from distoptim.testing.inspection import inspect
from distoptim.testing.processes import run
from tests.helpers.marks import fsdp

TAU = 4
STEPS = TAU + 2


def overlapped(params: Any, **options: Any) -> Any:
    # Two fragments and a codec with residuals; momentum in the anchor.
    return distoptim.OverlapLocalSGD(
        params, lr=0.05, momentum=0.9, tau=TAU, fragments=2, codec="int8+ef", **options
    )


def adam(params: Any, **options: Any) -> Any:
    inner = torch.optim.AdamW(params, lr=0.01)
    return distoptim.DiLoCo(inner, tau=TAU, delay=3, carry=True, **options)


def without_anchor(params: Any, **options: Any) -> Any:
    return distoptim.LocalSGD(params, lr=0.05, tau=TAU, delay=3, **options)


def model_of() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 40), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 2)
    )
    model.register_buffer("mask", torch.tensor([1.0, float("-inf")]))
    return model


MAKERS = {"overlapped": overlapped, "adam": adam, "without anchor": without_anchor}


def made(name: str) -> tuple[Any, Any]:
    model = model_of()
    return model, MAKERS[name](model.parameters(), module=model)


def steps(model: Any, optimizer: Any, rank: int, first: int, count: int) -> None:
    for step in range(first, first + count):
        data = torch.Generator().manual_seed(100 * rank + step)
        model(torch.randn(8, 3, generator=data)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()


def values(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([t.flatten().double() for t in model.state_dict().values()])


def saved(rank: int, folder: Path) -> None:
    for name in MAKERS:
        model, optimizer = made(name)
        steps(model, optimizer, rank, 0, STEPS)
        assert any(f.in_flight for f in inspect(optimizer).fragments)
        future = dcp.async_save(
            {"local": AveragingState(model, optimizer)}, checkpoint_id=folder / name
        )
        with optimizer.averaged(model):
            mean = values(model)
        steps(model, optimizer, rank, STEPS, TAU)
        future.result()
        for looked in (True, False):
            other, resumed = made(name)
            state = AveragingState(other, resumed, checkpoint_id=folder / name if looked else None)
            if looked:
                with pytest.raises(BaseException, match="nothing was loaded yet"):
                    dcp.save({"local": state}, checkpoint_id=folder / "wrong")
            dcp.load({"local": state}, checkpoint_id=folder / name)
            steps(other, resumed, rank, STEPS, TAU)
            assert torch.equal(values(other), values(model)), (name, looked)
            resumed.close()
        found = read_mean(folder / name)
        other.load_state_dict(found)
        torch.testing.assert_close(values(other), mean, rtol=0, atol=0)
        optimizer.close()


def loaded(rank: int, workers: int, folder: Path) -> None:
    for name in MAKERS:
        model, optimizer = made(name)
        state = {"local": AveragingState(model, optimizer, checkpoint_id=folder / name)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, checkpoint_id=folder / name, no_dist=workers == 1)
        mean = read_mean(folder / name)
        anchors = inspect(optimizer).anchors()
        x = torch.cat([p.detach().flatten() for p in model.parameters()])
        if anchors is None:
            other, unused = made(name)
            other.load_state_dict(mean)
            anchors = torch.cat([p.detach().flatten() for p in other.parameters()])
            unused.close()
        assert torch.equal(x, anchors), name
        assert torch.equal(model[1].running_mean, mean["1.running_mean"])
        assert inspect(optimizer).step == STEPS
        if workers > 1:
            steps(model, optimizer, rank, STEPS, TAU)
        optimizer.close()


def saved_by_four(rank: int, folder: Path) -> None:
    for name in MAKERS:
        model, optimizer = made(name)
        steps(model, optimizer, rank, 0, STEPS)
        dcp.save({"local": AveragingState(model, optimizer)}, checkpoint_id=folder / name)
        optimizer.close()


def test_as_many_workers_go_on_bit_equal_and_others_from_the_anchor(tmp_path: Path) -> None:
    run(saved, 2, tmp_path)
    # In this process, without torch.distributed.
    assert read_mean(tmp_path / "adam").keys() == model_of().state_dict().keys()
    names = dcp.FileSystemReader(tmp_path / "adam").read_metadata().state_dict_metadata
    # Shared state once, what is equal once, own state per worker.
    assert len([n for n in names if n.endswith("state.anchor")]) == 1
    assert len([n for n in names if n.endswith("mask")]) == 1
    assert len([n for n in names if n.endswith("state.0.exp_avg")]) == 2
    run(loaded, 3, 3, tmp_path)


def test_four_workers_become_two_and_one(tmp_path: Path) -> None:
    run(saved_by_four, 4, tmp_path)
    run(loaded, 2, 2, tmp_path)
    run(loaded, 1, 1, tmp_path)


def made_of_shards(islands: int) -> tuple[Any, Any]:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (islands, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    fully_shard(model, mesh=mesh["shard"])
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, distoptim.OverlapLocalSGD(inner, tau=TAU, device_mesh=mesh)


def local(model: Any) -> torch.Tensor:
    return torch.cat([p.to_local().detach().flatten() for p in model.parameters()])


def islands(rank: int, folder: Path) -> None:
    model, optimizer = made_of_shards(2)
    steps(model, optimizer, rank, 0, STEPS)
    dcp.save({"local": AveragingState(model, optimizer)}, checkpoint_id=folder)
    steps(model, optimizer, rank, STEPS, TAU)
    for looked in (True, False):
        other, resumed = made_of_shards(2)
        state = AveragingState(other, resumed, checkpoint_id=folder if looked else None)
        dcp.load({"local": state}, checkpoint_id=folder)
        steps(other, resumed, rank, STEPS, TAU)
        assert torch.equal(local(other), local(model))
        resumed.close()
    optimizer.close()


def one_island(rank: int, folder: Path) -> None:
    """Another number of islands starts from the anchor."""
    model, optimizer = made_of_shards(1)
    state = AveragingState(model, optimizer, checkpoint_id=folder)
    dcp.load({"local": state}, checkpoint_id=folder)
    anchors = inspect(optimizer).anchors()
    assert anchors is not None
    assert torch.equal(local(model), anchors)
    assert inspect(optimizer).step == STEPS
    steps(model, optimizer, rank, STEPS, TAU)


@fsdp
def test_islands(tmp_path: Path) -> None:
    run(islands, 4, tmp_path)
    assert read_mean(tmp_path)["0.weight"].shape == (5, 3)
    run(one_island, 2, tmp_path)


def alone() -> tuple[Any, Any]:
    model = torch.nn.Linear(2, 2)
    communicator = distoptim.comm.SingleWorker()
    return model, distoptim.LocalSGD(model.parameters(), lr=0.1, tau=2, communicator=communicator)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_refused(tmp_path: Path) -> None:
    model, optimizer = alone()
    with pytest.raises(ValueError, match="optimizer=SGD: allowed is an optimizer of distoptim"):
        AveragingState(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with optimizer.averaged(model), pytest.raises(RuntimeError, match=r"inside averaged\(\)"):
        AveragingState(model, optimizer).state_dict()
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "plain", no_dist=True)
    with pytest.raises(
        ValueError, match="the checkpoint has no state of distoptim: load the weights"
    ):
        AveragingState(model, optimizer, checkpoint_id=tmp_path / "plain").state_dict()
    state = AveragingState(model, optimizer)
    dcp.save({"a": state, "b": state}, checkpoint_id=tmp_path / "two", no_dist=True)
    with pytest.raises(ValueError, match=r"key=None: .* under \['a', 'b'\]"):
        read_mean(tmp_path / "two")
    assert torch.equal(read_mean(tmp_path / "two", key="b")["weight"], model.weight)
    with pytest.raises(ValueError, match="neither checkpoint_id nor storage_reader"):
        read_mean()
