"""The workers' mean for good, and of modules beside the trained one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import distoptim
from distoptim import ALGORITHMS
from distoptim.testing.inspection import inspect
from distoptim.testing.processes import run

TAU, WORKERS = 4, 3
MAKERS = {
    f"{name}-{count}-{codec}": partial(
        ALGORITHMS[name], lr=0.05, tau=TAU, fragments=count, codec=codec, timeout_s=60.0
    )
    for k, name in enumerate(ALGORITHMS)
    # By turns: each algorithm once, and each way with several.
    for count, codec in [((1, None), (2, "int8+ef"))[k % 2]]
}


def model_of(rank: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )


def steps(model: torch.nn.Module, optimizer: Any, rank: int, count: int) -> None:
    data = torch.Generator().manual_seed(rank)
    for _ in range(count):
        loss = model(torch.randn(8, 3, generator=data)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()


def floats(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([t.flatten() for t in model.state_dict().values() if t.is_floating_point()])


def consolidated(rank: int) -> dict[str, list[torch.Tensor]]:
    out = {}
    for name, make in MAKERS.items():
        model = model_of(rank)
        optimizer = make(model.parameters(), module=model)
        # In mid-round, with a mean in flight where there is a delay.
        steps(model, optimizer, rank, TAU + 2)
        local = floats(model)
        with optimizer.averaged(model):
            shown = floats(model)
        optimizer.consolidate(model)
        once = floats(model)
        in_flight = any(f.in_flight for f in inspect(optimizer).fragments)
        optimizer.consolidate(model)
        twice = floats(model)
        steps(model, optimizer, rank, 2 * TAU)
        optimizer.consolidate(model)
        anchors = inspect(optimizer).anchors()
        out[name] = [local, shown, once, twice, floats(model), torch.tensor(in_flight)]
        out[name].append(torch.zeros(1) if anchors is None else anchors)
        optimizer.close()
    return out


def test_consolidate_is_what_averaged_shows_for_good() -> None:
    results = run(consolidated, WORKERS)
    for name in MAKERS:
        found = [result[name] for result in results]
        mean = torch.stack([local for local, *_ in found]).mean(0)
        assert not torch.equal(found[0][0], found[1][0]), name
        for _, shown, once, twice, later, in_flight, anchor in found:
            torch.testing.assert_close(once, mean, rtol=1e-5, atol=1e-6)
            assert torch.equal(once, shown), name
            torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-7)
            assert torch.equal(later, found[0][4]), "all hold the same in the end"
            assert torch.isfinite(later).all()
            assert torch.equal(anchor, found[0][6])
            assert not in_flight


def moving_averages(rank: int) -> dict[str, Any]:
    model = model_of(rank)
    optimizer = distoptim.OverlapLocalSGD(model.parameters(), lr=0.05, tau=TAU, module=model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(TAU + 2):
        steps(model, optimizer, rank, 1)
        ema.update_parameters(model)
    own = floats(ema)
    before = floats(model)
    optimizer.average_module(ema)
    assert torch.equal(floats(model), before)
    with pytest.raises(
        ValueError, match=r"average_module\(Sequential\): it has parameters that this"
    ):
        optimizer.average_module(model)
    # Rounds went on untouched.
    steps(model, optimizer, rank, TAU)
    odd = torch.nn.Module()
    odd.register_buffer("mask", torch.tensor([1.0, float("-inf")]))
    optimizer.average_module(odd)
    assert torch.equal(odd.mask, torch.tensor([1.0, float("-inf")]))
    odd.mask[0] = rank
    with pytest.raises(
        ValueError, match=r"average_module\(\): 'mask' differs between rank 0 and rank 1"
    ):
        optimizer.average_module(odd)
    optimizer.flush()
    return {"own": own, "mean": floats(ema), "count": int(ema.n_averaged)}


def test_average_module_is_the_mean_of_moving_averages() -> None:
    results = run(moving_averages, WORKERS)
    mean = torch.stack([result["own"] for result in results]).mean(0)
    for result in results:
        torch.testing.assert_close(result["mean"], mean, rtol=1e-6, atol=1e-7)
        assert torch.equal(result["mean"], results[0]["mean"])
        assert result["count"] == TAU + 2
