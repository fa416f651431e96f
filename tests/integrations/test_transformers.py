"""Hugging Face's Trainer with averaging optimizers, against local updates written down in plain torch."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import TestCase

import pytest
import torch
import torch.distributed as dist

from distoptim.testing.inspection import inspect
from distoptim.testing.processes import run
from tests.helpers import marks
from tests.integrations.replay import BY_HAND, equal_everywhere, flat, of_the_page, ours, whole

pytestmark = marks.trainer("transformers")

# Two workers have 5 batches an epoch: the last group of an accumulation is short.
SIZE = 40
EPOCHS = 2
EVALUATING = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
}


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


def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, num_attention_heads=2, **sizes))


def data(count: int = SIZE) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"x": torch.randn(4, generator=generator), "labels": torch.randn(2, generator=generator)}
        for _ in range(count)
    ]


def texts() -> list[dict[str, list[int]]]:
    """Of lengths from 3 to 12, so that workers have unequal numbers of tokens."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(3, 13, (SIZE,), generator=generator)
    return [
        {"input_ids": torch.randint(11, (int(n),), generator=generator).tolist()} for n in lengths
    ]


def padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    tokens = [torch.tensor(text["input_ids"]) for text in batch]
    inputs = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-100)
    mask = (labels != -100).long()
    return {"input_ids": inputs, "labels": labels, "attention_mask": mask}


def arguments(folder: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": EPOCHS,
            "learning_rate": 0.05,
            "lr_scheduler_type": "linear",
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            **options,
        },
    )


def averaging_trainer() -> Any:
    from distoptim.integrations.transformers import AveragingTrainer

    return AveragingTrainer


def trainer_of(
    name: str,
    folder: Path,
    *callbacks: Any,
    dropout: float = 0.0,
    kind: Any = None,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    return (kind or averaging_trainer())(
        args=arguments(folder, **options),
        callbacks=list(callbacks),
        **{
            "model": made(dropout),
            "train_dataset": data(),
            "eval_dataset": data(8),
            "averaging": lambda inner: ours(name, inner),
            **(given or {}),
        },
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


def mean_loss(model: Any, group: list[Any]) -> torch.Tensor:
    """Of the batches of one step; each worker its own."""
    return torch.stack([model(**batch)["loss"] for batch in group]).mean()


def mean_loss_in_bf16(model: Any, group: list[Any]) -> torch.Tensor:
    """Autocast batch by batch: within one block it would keep the weights that it has cast."""

    def cast(**batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)

    return mean_loss(cast, group)


def loss_per_token(model: Any, group: list[Any]) -> torch.Tensor:
    """Each worker divides by its own number of tokens."""
    total = torch.zeros(())
    tokens = 0
    for batch in group:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        wanted = batch["labels"][:, 1:].flatten()
        total = total + torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), wanted, ignore_index=-100, reduction="sum"
        )
        tokens += int((wanted != -100).sum())
    return total / tokens


def by_hand(
    name: str,
    epochs: list[list[Any]],
    model: Any,
    inner: torch.optim.Optimizer,
    loss: Callable[..., torch.Tensor] = mean_loss,
) -> list[torch.Tensor]:
    total = sum((len(batches) + 1) // 2 for batches in epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: max(0.0, 1 - step / total))
    rounds = BY_HAND[name](list(model.parameters()))
    out = []
    for batches in epochs:
        for i in range(0, len(batches), 2):
            loss(model, batches[i : i + 2]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            inner.step()
            schedule.step()
            inner.zero_grad()
            rounds.average()
            out.append(flat(model))
    return out


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)


def equals(trainer: Any, seen: Any, expected: list[torch.Tensor]) -> None:
    """After training."""
    assert not isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    for x, y in zip(seen.params, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"distoptim/exposed_pct", "distoptim/tau", "distoptim/syncs"} <= logged[0].keys()
    assert trainer.optimizer.stats()["steps"] == len(expected)
    # After train() the model is the mean.
    equal_everywhere(flat(trainer.model))
    trainer.optimizer.optimizer.close()


def right_numbers(folder: Path, names: tuple[str, ...] = ("local", "overlap")) -> None:
    for name in names:
        seen = watcher()
        trainer = trainer_of(name, folder, seen)
        epochs = epochs_of(trainer)
        trainer.train()
        model = made()
        equals(trainer, seen, by_hand(name, epochs, model, adamw(model)))


def half_precision(folder: Path) -> None:
    seen = watcher()
    trainer = trainer_of("overlap", folder, seen, bf16=True, optim="sgd")
    epochs = epochs_of(trainer)
    trainer.train()
    model = made()
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    equals(trainer, seen, by_hand("overlap", epochs, model, inner, mean_loss_in_bf16))


def unequal_tokens(folder: Path) -> None:
    """A language model, texts grouped by length."""
    seen = watcher()
    given = {"model": language_model(), "train_dataset": texts(), "data_collator": padded}
    options = {"train_sampling_strategy": "group_by_length", "optim": "sgd"}
    trainer = trainer_of("overlap", folder, seen, given=given, **options)
    # Each call of the loader deals the texts out anew.
    epochs: list[list[Any]] = [[] for _ in range(EPOCHS)]
    collate = trainer.data_collator
    training_step = trainer.training_step

    def step(model: Any, inputs: Any, *args: Any, **options: Any) -> torch.Tensor:
        epochs[int(trainer.state.epoch or 0)].append({k: v.clone() for k, v in inputs.items()})
        loss: torch.Tensor = training_step(model, inputs, *args, **options)
        return loss

    trainer.training_step = step
    trainer.train()
    assert collate is padded
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in epochs[0])
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, tokens)
    assert len(set(everybody)) > 1
    model = language_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    equals(trainer, seen, by_hand("overlap", epochs, model, inner, loss_per_token))


def made_in_other_ways(folder: Path) -> None:
    """An optimizer of one's own, one by a factory, and a subclass; all train the same."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    seen = []

    class Factory:
        def __call__(self, model: Any, **options: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(model.parameters(), weight_decay=0.0, **options)

    class Mine(averaging_trainer(), Seq2SeqTrainer):  # type: ignore[misc]
        pass

    model = made()
    options = arguments(folder).to_dict()
    ways = (
        {"model": model, "averaging": None, "optimizers": (ours("overlap", adamw(model)), None)},
        {"optimizer_cls_and_kwargs": (Factory, {"lr": 0.05})},
        {"kind": Mine, "args": Seq2SeqTrainingArguments(**options)},
    )
    for given in ways:
        notes = watcher()
        kind = given.pop("kind", averaging_trainer())
        standard = {
            "model": made(),
            "args": arguments(folder),
            "train_dataset": data(),
            "averaging": lambda inner: ours("overlap", inner),
            "callbacks": [notes],
        }
        trainer = kind(**(standard | given))
        trainer.train()
        seen.append(notes.params)
        trainer.optimizer.optimizer.close()
    for other in seen[1:]:
        for x, y in zip(seen[0], other, strict=True):
            # Trainer's own is fused.
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def checkpoints(folder: Path) -> None:
    """Also: what is evaluated is what is saved, and the best of it is loaded."""
    from safetensors.torch import load_file

    seen = watcher()
    trainer = trainer_of("overlap", folder, seen, dropout=0.2, **EVALUATING)
    trainer.train()
    again = watcher()
    resumed = trainer_of("overlap", folder, again, dropout=0.2, **EVALUATING)
    # In mid-epoch and in mid-round, with a mean in flight.
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert len(again.whole) == len(seen.whole) - 4
    for x, y in zip(seen.whole[4:], again.whole, strict=True):
        assert torch.equal(x, y)
    losses = {}
    model = made()
    model.eval()
    for entry in [entry for entry in trainer.state.log_history if "eval_loss" in entry]:
        where = folder / f"checkpoint-{entry['step']}"
        model.load_state_dict(load_file(where / "model.safetensors"))
        batch = {key: torch.stack([row[key] for row in data(8)]) for key in ("x", "labels")}
        losses[str(where)] = model(**batch)["loss"].item()
        assert entry["eval_loss"] == pytest.approx(losses[str(where)], rel=1e-5)
    best = trainer.state.best_model_checkpoint
    assert best == min(losses, key=lambda key: losses[key])
    found = load_file(Path(best) / "model.safetensors")
    for key, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, found[key])
    equal_everywhere(flat(trainer.model))
    metrics = trainer.predict(data(8)).metrics
    assert metrics["test_loss"] == pytest.approx(losses[best], rel=1e-5)
    trainer.optimizer.optimizer.close()
    resumed.optimizer.optimizer.close()


def ends_early(folder: Path) -> None:
    from transformers import EarlyStoppingCallback

    # No loss is better by so much than the first one.
    patience = EarlyStoppingCallback(1, early_stopping_threshold=1e6)
    early = trainer_of("local", folder, patience, **EVALUATING)
    early.train()
    assert early.state.global_step == 4
    # And train() again goes on from the mean, without DDP.
    early.pop_callback(EarlyStoppingCallback)
    early.train()
    assert not isinstance(early.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert early.optimizer.stats()["steps"] == 4 + early.state.global_step
    early.optimizer.optimizer.close()


def weights_alone(folder: Path) -> None:
    """A checkpoint in which nothing is of ours."""
    where = folder / "two" / "checkpoint-4"
    plain = folder / "plain"
    if dist.get_rank() == 0:
        shutil.copytree(where, plain, ignore=shutil.ignore_patterns("distoptim_*"))
    dist.barrier()
    trainer = trainer_of("overlap", folder)
    with TestCase().assertLogs("distoptim", "WARNING") as said:
        trainer.train(resume_from_checkpoint=str(plain))
    assert [record.getMessage() for record in said.records] == [
        f"{plain} has no state of distoptim: a new run starts from its weights"
    ]
    assert trainer.state.global_step == 6
    assert trainer.optimizer.stats()["steps"] == 2
    trainer.optimizer.optimizer.close()


def refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizers=\(None, \.\.\.\): allowed is"):
        averaging_trainer()(model=made())
    for name, value in (("deepspeed", "zero.json"), ("fsdp", True)):
        args = arguments(folder)
        setattr(args, name, value)
        with pytest.raises(ValueError, match=r"deepspeed or args\.fsdp: they keep one model over"):
            averaging_trainer()(model=made(), args=args)


def plain_trainer(folder: Path) -> None:
    """Trainer itself puts DDP around the model, which the first step tells."""
    from transformers import Trainer

    model = made()
    args = arguments(folder)
    optimizer = ours("local", adamw(model))
    trainer = Trainer(model, args, train_dataset=data(), optimizers=(optimizer, None))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    about = [str(w.message) for w in told if "DistributedDataParallel is around" in str(w.message)]
    assert len(about) == 1
    assert "transformers.AveragingTrainer" in about[0]
    optimizer.close()


def page(folder: Path) -> None:
    args = arguments(folder, max_steps=2)
    names = {
        "model": made(),
        "args": args,
        "data": data(),
    }
    code = of_the_page("transformers")
    exec(compile(code, "transformers.md", "exec", dont_inherit=True), names)
    trainer: Any = names["trainer"]
    trainer.train()


def two(folder: Path) -> None:
    """All cases for two workers, one after the other; `launched.py` calls it too."""
    arguments(folder)
    right_numbers(folder)
    half_precision(folder)
    unequal_tokens(folder)
    made_in_other_ways(folder)
    checkpoints(folder / "two")
    ends_early(folder / "early")
    weights_alone(folder)
    refused(folder)
    plain_trainer(folder)
    page(folder)
    dist.destroy_process_group()
    print("transformers: all cases have passed")


def _two(rank: int, folder: Path) -> None:
    two(folder)


def _four(rank: int, folder: Path) -> None:
    """Twice as many workers have right numbers, and start from the anchor of what two have saved."""
    right_numbers(folder, ("overlap",))
    trainer = trainer_of("overlap", folder)
    found = []
    load = trainer._load_optimizer_and_scheduler  # noqa: SLF001  # Trainer's hook

    def loaded(checkpoint: Any) -> None:
        load(checkpoint)
        for fragment in inspect(trainer.optimizer.optimizer).fragments:
            x = torch.cat([p.detach().flatten() for p in fragment.params])
            assert fragment.anchor is not None
            assert torch.equal(x, fragment.anchor)
            equal_everywhere(x)
        found.append(checkpoint)

    trainer._load_optimizer_and_scheduler = loaded  # noqa: SLF001  # as above
    trainer.train(resume_from_checkpoint=str(folder / "two" / "checkpoint-2"))
    assert found
    trainer.optimizer.optimizer.close()
    dist.destroy_process_group()


def test_it_equals_local_updates_by_hand_and_resumes(tmp_path: Path) -> None:
    run(_two, 2, tmp_path, backend=None)
    run(_four, 4, tmp_path, backend=None)
