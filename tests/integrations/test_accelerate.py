"""Accelerate with averaging optimizers, against local updates written down in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distoptim.testing.processes import run
from tests.integrations.replay import BY_HAND, flat, of_the_page, ours, whole

pytest.importorskip("accelerate", reason="Accelerate is not installed: make test-integrations")

LENGTH = 11
MICRO = 2


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.2), torch.nn.Linear(6, 2)
    )


def batches(rank: int, epoch: int) -> list[torch.Tensor]:
    """An odd number, so that the last group of an accumulation is short."""
    data = torch.Generator().manual_seed(10 * epoch + rank)
    return [torch.randn(5, 4, generator=data) for _ in range(LENGTH)]


def setup(name: str, precision: str = "no", poisoned: bool = False) -> tuple[Any, ...]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from distoptim.integrations.accelerate import prepare

    # One process is several accelerators here.
    AcceleratorState._reset_state()  # noqa: SLF001  # Accelerate's own tests do so too
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=MICRO, mixed_precision=precision
    )
    if poisoned:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = model_of()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = ours(name, inner, module=model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    return (accelerator, *prepare(accelerator, model, optimizer, scheduler))


def loss_of(model: Any, batch: torch.Tensor, bad: bool) -> torch.Tensor:
    loss = model(batch).float().square().mean()
    return loss * float("inf") if bad else loss


def train(parts: tuple[Any, ...], rank: int, first: int, count: int, bad: int = -1) -> None:
    accelerator, model, optimizer, scheduler = parts
    todo = batches(rank, 0)[first : first + count]
    for i, batch in enumerate(todo, first):
        # As a prepared loader does at its end.
        complete = (i + 1) % MICRO == 0 or i + 1 == LENGTH
        accelerator.gradient_state._set_sync_gradients(complete)  # noqa: SLF001  # Trainer does so too
        accelerator.backward(loss_of(model, batch, rank == 1 and i == bad))
        if accelerator.sync_gradients:
            if accelerator.scaler is not None:
                # Accelerate does it by itself in fp16, which needs a GPU.
                accelerator.scaler.unscale_(optimizer.optimizer)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if accelerator.sync_gradients and not optimizer.step_was_skipped:
            scheduler.scheduler.step()
        optimizer.zero_grad()


def by_hand(name: str, rank: int, bf16: bool, bad: int) -> torch.Tensor:
    model = model_of()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 4, 0.5)
    rounds = BY_HAND[name](list(model.parameters()))
    infinite = False
    torch.manual_seed(1 + rank)
    for i, batch in enumerate(batches(rank, 0)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(batch)
        loss = out.float().square().mean()
        infinite |= rank == 1 and i == bad
        (loss / MICRO).backward()
        if (i + 1) % MICRO and i + 1 != LENGTH:
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not infinite:
            inner.step()
            scheduler.step()
        infinite = False
        inner.zero_grad()
        rounds.average()
    return flat(model)


def right_numbers(rank: int) -> None:
    for name in ("local", "overlap"):
        for precision, bad in (("no", -1), ("bf16", -1), ("no", 4)):
            parts = setup(name, precision, poisoned=bad >= 0)
            torch.manual_seed(1 + rank)
            train(parts, rank, 0, LENGTH, bad)
            _, model, optimizer, _ = parts
            expected = by_hand(name, rank, precision == "bf16", bad)
            torch.testing.assert_close(flat(model), expected, rtol=1e-6, atol=1e-6)
            assert not isinstance(model, torch.nn.parallel.DistributedDataParallel)
            assert optimizer.stats()["steps"] == 6
            with pytest.raises(RuntimeError, match="averages already: leave average"):
                optimizer.average()
            optimizer.optimizer.close()


def checkpoints(rank: int, folder: Path) -> None:
    from safetensors.torch import load_file

    for saved_at in (4, 8):
        # In mid-round, with a mean in flight.
        parts = setup("overlap")
        torch.manual_seed(1 + rank)
        train(parts, rank, 0, saved_at)
        where = folder / f"at{saved_at}"
        parts[0].save_state(str(where), safe_serialization=True)
        parts[0].wait_for_everyone()
        with parts[2].averaged(parts[1]):
            mean = whole(parts[1])
        train(parts, rank, saved_at, LENGTH - saved_at)
        resumed = setup("overlap")
        resumed[0].load_state(str(where))
        train(resumed, rank, saved_at, LENGTH - saved_at)
        assert torch.equal(whole(resumed[1]), whole(parts[1]))
        assert resumed[3].state_dict() == parts[3].state_dict()
        if rank == 0:
            other = model_of()
            other.load_state_dict(load_file(where / "model.safetensors"))
            torch.testing.assert_close(whole(other), mean, rtol=0, atol=0)
        parts[2].optimizer.close()
        resumed[2].optimizer.close()


def others(rank: int, folder: Path) -> None:
    parts = setup("overlap")
    parts[0].load_state(str(folder / "at8"))
    every = [torch.zeros_like(flat(parts[1])) for _ in range(3)]
    dist.all_gather(every, flat(parts[1]))
    assert torch.equal(every[0], every[2])
    train(parts, rank, 8, 3)


def _with(rank: int, fn: Any, *args: Any) -> None:
    fn(rank, *args)
    dist.destroy_process_group()


def test_it_equals_local_updates_by_hand(tmp_path: Path) -> None:
    run(_two, 2, tmp_path, backend=None)
    run(_three, 3, tmp_path, backend=None)


def _two(rank: int, folder: Path) -> None:
    _with(rank, _all, folder)


def page() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    import distoptim.integrations.accelerate

    AcceleratorState._reset_state()  # noqa: SLF001  # as above
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    names = {
        "distoptim": distoptim,
        "Accelerator": lambda **options: Accelerator(cpu=True, **options),
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
    }
    exec(compile(of_the_page("Accelerate"), "trainers.md", "exec", dont_inherit=True), names)
    assert type(names["optimizer"]).__name__ == "AveragedOptimizer"


def _all(rank: int, folder: Path) -> None:
    page()
    right_numbers(rank)
    checkpoints(rank, folder)


def _three(rank: int, folder: Path) -> None:
    _with(rank, others, folder)
