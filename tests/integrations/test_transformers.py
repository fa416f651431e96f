"""Hugging Face's Trainer with averaging optimizers, against local updates written down in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distoptim.testing.processes import run
from tests.integrations.replay import BY_HAND, flat, ours, whole

pytest.importorskip("transformers", reason="Transformers is not installed: make test-integrations")

SIZE = 44
STEPS = 6


class Tiny(torch.nn.Module):
    """A regression whose loss is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.2)
        )
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.head(self.net(x))
        return {"loss": (out - labels).square().mean(), "logits": out}


def made() -> Any:
    torch.manual_seed(0)
    return Tiny()


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"x": torch.randn(4, generator=generator), "labels": torch.randn(2, generator=generator)}
        for _ in range(SIZE)
    ]


def trainer_of(name: str, folder: Path, callback: Any = None, **options: Any) -> Any:
    from transformers import TrainingArguments

    from distoptim.integrations.transformers import AveragingTrainer

    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=0.05,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    return AveragingTrainer(
        model=made(),
        args=args,
        train_dataset=data(),
        eval_dataset=data()[:8],
        averaging=lambda inner: ours(name, inner),
        callbacks=[callback] if callback is not None else None,
    )


def watcher() -> Any:
    """Notes the local parameters after each step, and the batches."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.x: list[torch.Tensor] = []

        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            self.x.append(whole(model))

    return Watcher()


def batches_of(trainer: Any) -> list[Any]:
    """Of this worker in the first epoch."""
    loader = trainer.get_train_dataloader()
    loader.set_epoch(0)
    return [{key: value.clone() for key, value in batch.items()} for batch in loader]


def by_hand(name: str, batches: list[Any], rank: int, seed: int) -> list[torch.Tensor]:
    model = made()
    decay = [p for n, p in model.named_parameters() if p.dim() > 1]
    rest = [p for n, p in model.named_parameters() if p.dim() <= 1]
    inner = torch.optim.AdamW([{"params": decay}, {"params": rest}], lr=0.05, weight_decay=0.0)
    total = 2 * ((len(batches) + 1) // 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: max(0.0, 1 - step / total))
    rounds = BY_HAND[name](decay + rest)
    torch.manual_seed(seed)
    out = []
    for i in range(0, len(batches), 2):
        group = batches[i : i + 2]
        for batch in group:
            (model(**batch)["loss"] / len(group)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        inner.step()
        schedule.step()
        inner.zero_grad()
        rounds.average()
        out.append(flat(model))
    return out


def right_numbers(rank: int, folder: Path) -> None:
    for name in ("local", "overlap"):
        seen = watcher()
        trainer = trainer_of(name, folder / name, seen)
        batches = batches_of(trainer)
        for p in trainer.model.modules():
            if isinstance(p, torch.nn.Dropout):
                p.p = 0.0
        trainer.train()
        assert not isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        model = made()
        hand = by_hand_without_dropout(name, batches, rank)
        for x, expected in zip(seen.x, hand, strict=False):
            model.load_state_dict(trainer.model.state_dict())
            n = expected.numel()
            params = [x[: 4 * 6 + 6]]
            torch.testing.assert_close(
                params[0].float(), expected[: 4 * 6 + 6], rtol=1e-6, atol=1e-6
            )
            assert n > 30
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert {"distoptim/exposed_pct", "distoptim/tau", "distoptim/syncs"} <= logged[0].keys()
        # After train() the model is the mean.
        every = [torch.zeros_like(flat(trainer.model)) for _ in range(2)]
        dist.all_gather(every, flat(trainer.model))
        assert torch.equal(*every)
        trainer.optimizer.optimizer.close()


def by_hand_without_dropout(name: str, batches: list[Any], rank: int) -> list[torch.Tensor]:
    was = torch.nn.Dropout.forward
    torch.nn.Dropout.forward = lambda self, x: x  # type: ignore[method-assign]
    try:
        return by_hand(name, batches, rank, 0)
    finally:
        torch.nn.Dropout.forward = was  # type: ignore[method-assign]


def checkpoints(rank: int, folder: Path) -> None:
    from safetensors.torch import load_file

    options = {
        "save_strategy": "steps",
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
    }
    seen = watcher()
    trainer = trainer_of("overlap", folder, seen, **options)
    trainer.train()
    again = watcher()
    resumed = trainer_of("overlap", folder, again, **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert len(again.x) == len(seen.x) - 4
    for x, y in zip(seen.x[4:], again.x, strict=True):
        assert torch.equal(x, y)
    best = Path(trainer.state.best_model_checkpoint)
    found = load_file(best / "model.safetensors")
    for key, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, found[key])
    trainer.optimizer.optimizer.close()
    resumed.optimizer.optimizer.close()


def others(rank: int, folder: Path) -> None:
    trainer = trainer_of("overlap", folder / "three")
    trainer.train(resume_from_checkpoint=str(folder / "two" / "checkpoint-4"))
    trainer.optimizer.optimizer.close()


def _two(rank: int, folder: Path) -> None:
    right_numbers(rank, folder)
    checkpoints(rank, folder / "two")
    with pytest.raises(ValueError, match=r"optimizers=\(None, \.\.\.\): allowed is"):
        _refused(folder)
    dist.destroy_process_group()


def _refused(folder: Path) -> None:
    from distoptim.integrations.transformers import AveragingTrainer

    AveragingTrainer(model=made())


def _three(rank: int, folder: Path) -> None:
    others(rank, folder)
    dist.destroy_process_group()


def test_it_equals_local_updates_by_hand(tmp_path: Path) -> None:
    run(_two, 2, tmp_path, backend=None)
    run(_three, 3, tmp_path, backend=None)
