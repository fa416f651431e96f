"""Accelerate with averaging optimizers, against local updates written down in plain torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import TestCase

import pytest
import torch
import torch.distributed as dist

import distoptim
from distoptim.periods import AdaComm
from distoptim.testing.inspection import inspect
from distoptim.testing.processes import run
from tests.helpers import marks
from tests.integrations.replay import BY_HAND, equal_everywhere, flat, of_the_page, ours, whole

pytestmark = marks.trainer("accelerate")

# An odd number of batches, so that the last group of an accumulation is short.
LENGTH = 11
MICRO = 2
SIZE = 5


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.2), torch.nn.Linear(6, 2)
    )


def accelerator_of(precision: str = "no", poisoned: bool = False, **options: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # One process is several accelerators here.
    AcceleratorState._reset_state()  # noqa: SLF001  # Accelerate's own tests do so too
    made = Accelerator(
        cpu=True, gradient_accumulation_steps=MICRO, mixed_precision=precision, **options
    )
    if poisoned:
        # Accelerate makes one by itself in fp16, which needs a GPU.
        made.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return made


def loader_of() -> Any:
    data = torch.randn(
        LENGTH * SIZE * dist.get_world_size(), 4, generator=torch.Generator().manual_seed(9)
    )
    return torch.utils.data.DataLoader(
        data, SIZE, shuffle=True, generator=torch.Generator().manual_seed(1)
    )


def setup(name: str, precision: str = "no", poisoned: bool = False) -> Any:
    from distoptim.integrations.accelerate import prepare

    accelerator = accelerator_of(precision, poisoned)
    model = model_of()
    optimizer = ours(name, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), module=model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    names = ("model", "optimizer", "scheduler", "loader")
    found = prepare(accelerator, model, optimizer, scheduler, loader_of())
    return SimpleNamespace(
        accelerator=accelerator, **dict(zip(names, found, strict=True)), batches=[], stats={}
    )


def train(parts: Any, first: int = 0, bad: tuple[int, int] = (-1, -1), save: Any = None) -> None:
    """As Accelerate's own examples; the loss of worker bad[0] is infinite at batch bad[1]."""
    accelerator = parts.accelerator
    loader = accelerator.skip_first_batches(parts.loader, first) if first else parts.loader
    for i, batch in enumerate(loader, first):
        if save is not None:
            save(i)
        parts.batches.append(batch.clone())
        with accelerator.accumulate(parts.model):
            loss = parts.model(batch).float().square().mean()
            if (accelerator.process_index, i) == bad:
                loss = loss * float("inf")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                if accelerator.scaler is not None:
                    # As above.
                    accelerator.scaler.unscale_(parts.optimizer.optimizer)
                accelerator.clip_grad_norm_(parts.model.parameters(), 1.0)
            parts.optimizer.step()
            parts.scheduler.step()
            parts.optimizer.zero_grad()
    parts.stats = parts.optimizer.stats()


def by_hand(name: str, batches: list[torch.Tensor], bf16: bool, bad: int) -> torch.Tensor:
    model = model_of()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # Accelerate counts the batches of all workers.
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.9 ** dist.get_world_size())
    rounds = BY_HAND[name](list(model.parameters()))
    infinite = False
    torch.manual_seed(1 + dist.get_rank())
    for i, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(batch)
        infinite |= i == bad
        (out.float().square().mean() / MICRO).backward()
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


# Precision, and the batch of worker 1 of which a GradScaler skips the step.
CASES = (("no", -1), ("bf16", -1), ("no", 4))


def right_numbers(names: tuple[str, ...] = ("local", "overlap"), cases: Any = CASES) -> None:
    rank = dist.get_rank()
    for name in names:
        for precision, bad in cases:
            parts = setup(name, precision, poisoned=bad >= 0)
            torch.manual_seed(1 + rank)
            train(parts, bad=(1, bad))
            expected = by_hand(name, parts.batches, precision == "bf16", bad if rank == 1 else -1)
            torch.testing.assert_close(flat(parts.model), expected, rtol=1e-6, atol=1e-6)
            assert not isinstance(parts.model, torch.nn.parallel.DistributedDataParallel)
            assert parts.stats["steps"] == 6
            with pytest.raises(RuntimeError, match="averages already: leave average"):
                parts.optimizer.average()
            parts.optimizer.optimizer.close()


def checkpoints(folder: Path) -> None:
    from safetensors.torch import load_file

    rank = dist.get_rank()
    through = setup("overlap")
    torch.manual_seed(1 + rank)
    train(through)
    parts = setup("overlap")
    means = {}

    def save(batch: int) -> None:
        # In mid-epoch and in mid-round, with a mean in flight.
        if batch in (4, 8):
            parts.accelerator.save_state(str(folder / f"at{batch}"))
            with parts.optimizer.averaged(parts.model):
                means[batch] = whole(parts.model)

    torch.manual_seed(1 + rank)
    train(parts, save=save)
    assert torch.equal(whole(parts.model), whole(through.model)), "saving disturbs nothing"
    parts.accelerator.wait_for_everyone()
    for batch, mean in means.items():
        resumed = setup("overlap")
        resumed.accelerator.load_state(str(folder / f"at{batch}"))
        train(resumed, batch)
        assert all(map(torch.equal, through.batches[batch:], resumed.batches))
        assert torch.equal(whole(resumed.model), whole(through.model))
        assert resumed.scheduler.state_dict() == through.scheduler.state_dict()
        other = model_of()
        other.load_state_dict(load_file(folder / f"at{batch}" / "model.safetensors"))
        torch.testing.assert_close(whole(other), mean, rtol=0, atol=0)
        resumed.optimizer.optimizer.close()
    through.optimizer.optimizer.close()
    parts.optimizer.optimizer.close()


def scale_of_its_own(folder: Path) -> None:
    """Of a GradScaler that has skipped a step, which Accelerate saves of rank 0 alone."""
    parts = setup("local", poisoned=True)
    train(parts, bad=(1, 4))
    scale = parts.accelerator.scaler.get_scale()
    assert scale == (4.0 if dist.get_rank() == 1 else 8.0)
    parts.accelerator.save_state(str(folder))
    parts.accelerator.wait_for_everyone()
    resumed = setup("local", poisoned=True)
    resumed.accelerator.load_state(str(folder))
    train(resumed, LENGTH - 1)
    assert resumed.accelerator.scaler.get_scale() == scale
    parts.optimizer.optimizer.close()
    resumed.optimizer.optimizer.close()


def weights_alone(folder: Path) -> None:
    """What Accelerate has saved without us."""
    model = model_of()
    accelerator = accelerator_of()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, plain, torch.optim.lr_scheduler.ConstantLR(plain), loader_of())
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    parts = setup("overlap")
    with TestCase().assertLogs("distoptim", "WARNING") as said:
        parts.accelerator.load_state(str(folder))
    assert [record.getMessage() for record in said.records] == [
        f"{folder} has no state of distoptim: a new run starts from its weights"
    ]
    assert flat(parts.model).eq(0.5).all()
    train(parts)
    assert parts.stats["steps"] == 6
    parts.optimizer.optimizer.close()


def tied_and_compiled(folder: Path) -> None:
    """Of weights that are one, one is written, and loaded."""
    from distoptim.integrations.accelerate import prepare

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = ours("local", torch.optim.SGD(model.parameters(), lr=0.1), module=model)
    accelerator = accelerator_of(dynamo_backend="eager")
    prepared, _ = prepare(accelerator, model, optimizer)
    assert type(prepared).__name__ == "OptimizedModule"
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    before = whole(model)
    with torch.no_grad():
        model[0].weight.zero_()
    accelerator.load_state(str(folder))
    assert torch.equal(whole(model), before)
    optimizer.close()


def trackers(folder: Path) -> None:
    """`stats()` are what they take."""
    from accelerate.tracking import GeneralTracker, on_main_process

    class Notes(GeneralTracker):  # type: ignore[misc]
        name = "notes"
        requires_logging_directory = False
        noted: list[dict[str, float]] = []  # noqa: RUF012  # of a class within a function
        tracker = None

        @on_main_process
        def store_init_configuration(self, values: Any) -> None: ...

        @on_main_process
        def log(self, values: Any, step: Any = None, **_: Any) -> None:
            self.noted.append(values)

    accelerator = accelerator_of(log_with=[Notes()])
    accelerator.init_trackers("tests")
    parts = setup("local")
    train(parts)
    accelerator.log(parts.optimizer.stats(), step=6)
    if dist.get_rank() == 0:
        assert Notes.noted[0]["syncs"] == 2
    parts.optimizer.optimizer.close()


def plain_prepare() -> None:
    """Accelerate's own puts DDP around the model, which the first step tells."""
    accelerator = accelerator_of()
    model = model_of()
    optimizer = accelerator.prepare(model, ours("local", torch.optim.SGD(model.parameters())))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            accelerator.backward(optimizer[0](torch.ones(2, 4)).sum())
            optimizer[1].step()
    about = [str(w.message) for w in told if "DistributedDataParallel is around" in str(w.message)]
    assert len(about) == 1
    assert "distoptim.integrations.accelerate.prepare(accelerator, ...)" in about[0]
    optimizer[1].optimizer.close()


def refused() -> None:
    from distoptim.integrations.accelerate import prepare

    model = model_of()
    optimizer = ours("local", torch.optim.SGD(model.parameters()))
    sharded = SimpleNamespace(distributed_type="DistributedType.FSDP")
    with pytest.raises(ValueError, match="accelerator of distributed type FSDP, which keeps a"):
        prepare(sharded, model, optimizer)
    with pytest.raises(ValueError, match="LocalSGD without the model that it trains"):
        prepare(accelerator_of(), optimizer, model_of())
    optimizer.close()
    model = model_of()
    follows = distoptim.LocalSGD(model.parameters(), lr=0.1, tau=AdaComm(8, interval=8))
    with pytest.raises(
        ValueError, match=r"tau=AdaComm.* follows the loss, which a trainer does not"
    ):
        prepare(accelerator_of(), model, follows)
    follows.close()


def page() -> None:
    from accelerate import Accelerator

    accelerator_of()
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    names = {
        "Accelerator": lambda **options: Accelerator(cpu=True, **options),
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
    }
    exec(compile(of_the_page("accelerate"), "accelerate.md", "exec", dont_inherit=True), names)
    assert type(names["optimizer"]).__name__ == "AveragedOptimizer"


def two(folder: Path) -> None:
    """All cases for two workers, one after the other; `launched.py` calls it too."""
    page()
    right_numbers()
    checkpoints(folder)
    scale_of_its_own(folder / "scale")
    weights_alone(folder / "plain")
    tied_and_compiled(folder / "tied")
    trackers(folder)
    plain_prepare()
    refused()
    dist.destroy_process_group()
    print("accelerate: all cases have passed")


def _two(rank: int, folder: Path) -> None:
    two(folder)


def _four(rank: int, folder: Path) -> None:
    """Twice as many workers have right numbers, and start from the anchor of what two have saved."""
    accelerator_of()
    right_numbers(("overlap",), CASES[2:])
    parts = setup("overlap")
    parts.accelerator.load_state(str(folder / "at8"))
    equal_everywhere(flat(parts.model))
    anchors = inspect(parts.optimizer.optimizer).anchors()
    assert anchors is not None
    assert torch.equal(flat(parts.model), anchors)
    train(parts, 8)
    dist.destroy_process_group()


def test_it_equals_local_updates_by_hand_and_resumes(tmp_path: Path) -> None:
    run(_two, 2, tmp_path, backend=None)
    run(_four, 4, tmp_path, backend=None)
