"""Hugging Face's Trainer with averaging optimizers, against local updates written down in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distoptim.testing.processes import run
from tests.integrations.replay import BY_HAND, flat, of_the_page, ours, whole

pytest.importorskip("transformers", reason="Transformers is not installed: make test-integrations")

# Two workers have 5 batches an epoch: the last group of an accumulation is short.
SIZE = 40
EPOCHS = 2


class Tiny(torch.nn.Module):
    """A regression whose loss is its own."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        # The gradient of a bias before batch norm is rounding alone, which Adam makes a whole step of.
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 6, bias=False), torch.nn.BatchNorm1d(6), torch.nn.Dropout(dropout)
        )
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.head(self.net(x))
        return {"loss": (out - labels).square().mean(), "logits": out}


def made(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    return Tiny(dropout)


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"x": torch.randn(4, generator=generator), "labels": torch.randn(2, generator=generator)}
        for _ in range(SIZE)
    ]


def trainer_of(
    name: str, folder: Path, callback: Any = None, dropout: float = 0.0, **options: Any
) -> Any:
    from transformers import TrainingArguments

    from distoptim.integrations.transformers import AveragingTrainer

    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=EPOCHS,
        learning_rate=0.05,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    return AveragingTrainer(
        model=made(dropout),
        args=args,
        train_dataset=data(),
        eval_dataset=data()[:8],
        averaging=lambda inner: ours(name, inner),
        callbacks=[callback] if callback is not None else None,
    )


def watcher() -> Any:
    """Notes what the local model holds after each step."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.params: list[torch.Tensor] = []
            self.whole: list[torch.Tensor] = []

        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            self.params.append(flat(model))
            self.whole.append(whole(model))

    return Watcher()


def epochs_of(trainer: Any) -> list[list[Any]]:
    """This worker's batches, epoch by epoch."""
    out = []
    for epoch in range(EPOCHS):
        loader = trainer.get_train_dataloader()
        loader.set_epoch(epoch)
        out.append([{key: value.clone() for key, value in batch.items()} for batch in loader])
    return out


def by_hand(name: str, epochs: list[list[Any]]) -> list[torch.Tensor]:
    model = made()
    inner = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    total = sum((len(batches) + 1) // 2 for batches in epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: max(0.0, 1 - step / total))
    rounds = BY_HAND[name](list(model.parameters()))
    out = []
    for batches in epochs:
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
        epochs = epochs_of(trainer)
        assert len(epochs[0]) % 2
        trainer.train()
        assert not isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        for x, expected in zip(seen.params, by_hand(name, epochs), strict=True):
            torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert {"distoptim/exposed_pct", "distoptim/tau", "distoptim/syncs"} <= logged[0].keys()
        # After train() the model is the mean.
        every = [torch.zeros_like(flat(trainer.model)) for _ in range(2)]
        dist.all_gather(every, flat(trainer.model))
        assert torch.equal(*every)
        trainer.optimizer.optimizer.close()


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
    trainer = trainer_of("overlap", folder, seen, dropout=0.2, **options)
    trainer.train()
    again = watcher()
    resumed = trainer_of("overlap", folder, again, dropout=0.2, **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert len(again.whole) == len(seen.whole) - 4
    for x, y in zip(seen.whole[4:], again.whole, strict=True):
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
        trainer_class()(model=made())
    page(folder)
    dist.destroy_process_group()


def trainer_class() -> Any:
    from distoptim.integrations.transformers import AveragingTrainer

    return AveragingTrainer


def page(folder: Path) -> None:
    from transformers import TrainingArguments

    import distoptim

    args = TrainingArguments(str(folder / "page"), use_cpu=True, max_steps=2, report_to=[])
    names = {
        "distoptim": distoptim,
        "AveragingTrainer": trainer_class(),
        "model": made(),
        "args": args,
        "data": data(),
    }
    code = of_the_page("Hugging Face's Trainer")
    exec(compile(code, "trainers.md", "exec", dont_inherit=True), names)
    trainer: Any = names["trainer"]
    trainer.train()


def _three(rank: int, folder: Path) -> None:
    others(rank, folder)
    dist.destroy_process_group()


def test_it_equals_local_updates_by_hand(tmp_path: Path) -> None:
    run(_two, 2, tmp_path, backend=None)
    run(_three, 3, tmp_path, backend=None)
