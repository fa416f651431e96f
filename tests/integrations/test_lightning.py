"""Lightning with averaging optimizers, against local updates written down in plain torch."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distoptim.testing.processes import run
from tests.integrations.replay import BY_HAND, flat, of_the_page, ours, whole

pytest.importorskip("lightning", reason="Lightning is not installed: make test-integrations")

BATCHES = 5
EPOCHS = 2


def net_of(dropout: float) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6, bias=False),
        torch.nn.BatchNorm1d(6),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(6, 2),
    )


def batches(rank: int) -> list[torch.Tensor]:
    data = torch.Generator().manual_seed(rank)
    return [torch.randn(5, 4, generator=data) for _ in range(BATCHES)]


class Own(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """This worker's batches, as they are."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Any:
        return iter(batches(self.rank))

    def __len__(self) -> int:
        return BATCHES


def module_of(name: str, rank: int, dropout: float = 0.0) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net_of(dropout)
            self.seen: list[torch.Tensor] = []
            self.params: list[torch.Tensor] = []
            self.validated: list[torch.Tensor] = []

        def training_step(self, _: torch.Tensor, index: int) -> torch.Tensor:
            # By its index: in the middle of an epoch, loaders that Lightning cannot save begin anew.
            return self.net(batches(rank)[index]).square().mean()

        def validation_step(self, batch: torch.Tensor, _: int) -> None:
            self.validated.append(flat(self.net))
            self.log("val", self.net(batch).square().mean(), sync_dist=True)

        def on_train_batch_end(self, *_: Any) -> None:
            self.params.append(flat(self.net))
            self.seen.append(whole(self.net))

        def configure_optimizers(self) -> Any:
            inner = torch.optim.AdamW(self.parameters(), lr=0.05)
            optimizer = ours(name, inner, module=self)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Own(rank), batch_size=None)

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Own(7), batch_size=None)

    return Module()


def trainer_of(folder: Path, devices: int, callbacks: Any = (), **options: Any) -> Any:
    import lightning.pytorch as pl

    from distoptim.integrations.lightning import AveragingCallback, AveragingStrategy

    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=AveragingStrategy(),
        callbacks=[AveragingCallback(), *callbacks],
        default_root_dir=folder,
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"enable_checkpointing": False, **options},
    )


def by_hand(name: str, rank: int) -> list[torch.Tensor]:
    model = net_of(0.0)
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 2, 0.5)
    rounds = BY_HAND[name](list(model.parameters()))
    out = []
    for _ in range(EPOCHS):
        for i, batch in enumerate(batches(rank)):
            # As Lightning does, also in a short last group.
            (model(batch).square().mean() / 2).backward()
            if (i + 1) % 2 == 0 or i + 1 == BATCHES:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                inner.step()
                schedule.step()
                inner.zero_grad()
                rounds.average()
            out.append(flat(model))
    return out


def right_numbers(rank: int, folder: Path) -> None:
    for name in ("local", "overlap"):
        module = module_of(name, rank)
        trainer = trainer_of(folder, 2)
        trainer.fit(module)
        assert not isinstance(trainer.strategy.model, torch.nn.parallel.DistributedDataParallel)
        for x, expected in zip(module.params, by_hand(name, rank), strict=True):
            torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
        assert {"distoptim/exposed_pct", "distoptim/tau"} <= trainer.callback_metrics.keys()
        for x in (module.validated[0], flat(module.net)):
            every = [torch.zeros_like(x) for _ in range(2)]
            dist.all_gather(every, x)
            assert torch.equal(*every), "validation and the end see the mean"
        before = flat(module.net)
        trainer.validate(module, verbose=False)
        assert torch.equal(flat(module.net), before)


def checkpoints(rank: int, folder: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def saved() -> Any:
        return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    module = module_of("overlap", rank)
    trainer = trainer_of(folder, 2, [saved()], enable_checkpointing=True)
    trainer.fit(module)
    path = saved_at(folder)
    found = torch.load(path, weights_only=True)["state_dict"]
    own = torch.load(f"{path}.workers/distoptim_{rank}_of_2.pt", weights_only=True)["model"]
    mean = own["net.3.weight"].clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(found["net.3.weight"], mean / 2)
    resumed = module_of("overlap", rank)
    trainer_of(folder / "again", 2).fit(resumed, ckpt_path=str(path))
    for x, y in zip(module.seen[-len(resumed.seen) :], resumed.seen, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(whole(module.net), whole(resumed.net))
    dist.barrier()
    path = folder / "step=2.ckpt"
    trainer.strategy.remove_checkpoint(str(path))
    dist.barrier()
    assert not path.exists()
    assert not Path(f"{path}.workers").exists()


def saved_at(folder: Path) -> Path:
    """In mid-round and in mid-epoch."""
    return folder / "step=4.ckpt"


def others(rank: int, folder: Path) -> None:
    module = module_of("overlap", rank)
    trainer_of(folder, 3).fit(module, ckpt_path=str(saved_at(folder)))


def refused(rank: int, folder: Path) -> None:
    module = module_of("local", rank)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="AveragingStrategy with SGD, whose parameters would stay"):
        trainer_of(folder, 2).fit(module)


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def _two(rank: int, folder: Path) -> None:
    quiet()
    right_numbers(rank, folder)
    checkpoints(rank, folder)
    refused(rank, folder)
    names: dict[str, Any] = {}
    exec(compile(of_the_page("Lightning"), "trainers.md", "exec", dont_inherit=True), names)
    dist.destroy_process_group()


def _three(rank: int, folder: Path) -> None:
    quiet()
    others(rank, folder)
    dist.destroy_process_group()


def test_it_equals_local_updates_by_hand(tmp_path: Path) -> None:
    run(_two, 2, tmp_path, backend=None)
    run(_three, 3, tmp_path, backend=None)
