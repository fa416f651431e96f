"""Lightning with averaging optimizers, against local updates written down in plain torch."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
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

pytestmark = marks.trainer("lightning")

BATCHES = 5
EPOCHS = 2
SCALE = 8.0


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


class Shuffled:
    """A loader that Lightning can save: each worker's batches in an order of its own."""

    def __init__(self, rank: int) -> None:
        self.batches = batches(rank)
        self.order = torch.Generator().manual_seed(rank)
        self.state: dict[str, Any] = {}

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[torch.Tensor]:
        first = self.state.pop("next", 0)
        if first:
            self.order.set_state(self.state["order"])
        before = self.order.get_state()
        for i, index in enumerate(torch.randperm(BATCHES, generator=self.order).tolist()):
            if i >= first:
                self.state = {"order": before, "next": (i + 1) % BATCHES}
                yield self.batches[index]

    def state_dict(self) -> dict[str, Any]:
        return self.state.copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state.copy()


def torchdata_of(rank: int) -> Any:
    """torchdata's, whose sampler draws from a generator of the worker's own."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    order = torch.Generator().manual_seed(rank)
    return StatefulDataLoader(batches(rank), batch_size=None, shuffle=True, generator=order)


def module_of(
    name: str, dropout: float = 0.0, lr: float = 0.05, bad: tuple[int, int] = (-1, -1)
) -> Any:
    """The loss of worker bad[0] is infinite at batch bad[1] of the first epoch."""
    import lightning.pytorch as pl

    rank = dist.get_rank() if dist.is_initialized() else 0

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net_of(dropout)
            self.seen: list[torch.Tensor] = []
            self.params: list[torch.Tensor] = []
            self.validated: list[torch.Tensor] = []

        def training_step(self, _: torch.Tensor, index: int) -> torch.Tensor:
            # By its index: in the middle of an epoch, loaders that Lightning cannot save begin anew.
            loss = self.net(batches(rank)[index]).float().square().mean()
            return loss * float("inf") if (self.current_epoch, rank, index) == (0, *bad) else loss

        def validation_step(self, batch: torch.Tensor, _: int) -> None:
            self.validated.append(whole(self.net))
            self.log("val", self.net(batch).square().mean(), sync_dist=True)

        def predict_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            out: torch.Tensor = self.net(batch)
            return out

        def on_train_batch_end(self, *_: Any) -> None:
            self.params.append(flat(self.net))
            self.seen.append(whole(self.net))

        def configure_optimizers(self) -> Any:
            inner = torch.optim.AdamW(self.parameters(), lr=lr)
            optimizer = ours(name, inner, module=self)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Own(rank), batch_size=None)

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Own(7), batch_size=None)

    return Module()


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> Any:
    import lightning.pytorch as pl

    from distoptim.integrations.lightning import AveragingCallback, AveragingStrategy

    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": dist.get_world_size() if dist.is_initialized() else 2,
            "strategy": AveragingStrategy(),
            "callbacks": [AveragingCallback(), *callbacks],
            "default_root_dir": folder,
            "max_epochs": EPOCHS,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            **options,
        }
    )


def by_hand(name: str, precision: str, bad: int = -1) -> list[torch.Tensor]:
    model = net_of(0.0)
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 2, 0.5)
    rounds = BY_HAND[name](list(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=precision == "16-mixed")
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    out = []
    for epoch in range(EPOCHS):
        for i, batch in enumerate(batches(dist.get_rank())):
            with torch.autocast("cpu", dtype, enabled=precision != "32-true"):
                loss = model(batch).float().square().mean()
            if (epoch, i) == (0, bad):
                loss = loss * float("inf")
            # As Lightning does, also in a short last group.
            scaler.scale(loss / 2).backward()
            if (i + 1) % 2 == 0 or i + 1 == BATCHES:
                scaler.unscale_(inner)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(inner)
                scaler.update()
                schedule.step()
                inner.zero_grad()
                rounds.average()
            out.append(flat(model))
    return out


CASES = (("local", "32-true"), ("overlap", "32-true"), ("overlap", "bf16-mixed"))


def right_numbers(folder: Path, cases: tuple[tuple[str, str], ...] = CASES) -> None:
    for name, precision in cases:
        module = module_of(name)
        trainer = trainer_of(folder, precision=precision)
        trainer.fit(module)
        assert not isinstance(trainer.strategy.model, torch.nn.parallel.DistributedDataParallel)
        expected = by_hand(name, precision)
        for x, y in zip(module.params, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
        assert {"distoptim/exposed_pct", "distoptim/tau"} <= trainer.callback_metrics.keys()
        # In validation, and from the end on.
        equal_everywhere(flat(module.net))
        held = whole(module.net)
        torch.testing.assert_close(module.validated[-1], held)
        trainer.validate(module, verbose=False)
        assert torch.equal(module.validated[-1], held)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            outs = trainer.predict(module, module.val_dataloader())
            module.net.eval()
            assert torch.equal(outs[0], module.net(batches(7)[0]))


def skipped_by_one(folder: Path) -> None:
    """A GradScaler skips worker 1's second step, which counts; its scale is its own after a checkpoint."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins import MixedPrecision

    def trained(*callbacks: Any, resume: str | None = None) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        module = module_of("overlap", bad=(1, 2))
        trainer = trainer_of(
            folder,
            *callbacks,
            enable_checkpointing=bool(callbacks),
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        )
        trainer.fit(module, ckpt_path=resume)
        assert scaler.get_scale() == (SCALE / 2 if dist.get_rank() == 1 else SCALE)
        return module

    every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    module = trained(every)
    expected = by_hand("overlap", "16-mixed", bad=2 if dist.get_rank() == 1 else -1)
    for x, y in zip(module.params, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    resumed = trained(resume=str(saved_at(folder)))
    assert torch.equal(whole(module.net), whole(resumed.net))


def checkpoints(folder: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def trained(*callbacks: Any, resume: str | None = None) -> Any:
        module = module_of("overlap", dropout=0.2)
        trainer = trainer_of(folder, *callbacks, enable_checkpointing=bool(callbacks))
        torch.manual_seed(1 + dist.get_rank())
        trainer.fit(module, ckpt_path=resume)
        return trainer, module

    every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    _, through = trained()
    trainer, module = trained(every)
    assert torch.equal(whole(through.net), whole(module.net)), "saving disturbs nothing"
    path = saved_at(folder)
    found = torch.load(path, weights_only=True)["state_dict"]
    rank = dist.get_rank()
    own = torch.load(f"{path}.workers/distoptim_{rank}_of_2.pt", weights_only=True)["model"]
    mean = own["net.3.weight"].clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(found["net.3.weight"], mean / 2)
    _, resumed = trained(resume=str(path))
    assert len(resumed.seen) < len(module.seen)
    for x, y in zip(module.seen[-len(resumed.seen) :], resumed.seen, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(whole(module.net), whole(resumed.net))
    dist.barrier()
    path = folder / "step=2.ckpt"
    trainer.strategy.remove_checkpoint(str(path))
    dist.barrier()
    assert not path.exists()
    assert not Path(f"{path}.workers").exists()


def data_order(folder: Path) -> None:
    """In the middle of an epoch each worker goes on with its own next batch."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def trained(loader: Any, *callbacks: Any, resume: str | None = None) -> list[torch.Tensor]:
        module = module_of("overlap")
        met = []

        def step(batch: torch.Tensor) -> torch.Tensor:
            met.append(batch.clone())
            return module.net(batch).square().mean()

        module.training_step = step
        module.train_dataloader = lambda: loader(dist.get_rank())
        # Batches are each worker's own already.
        options = {"enable_checkpointing": bool(callbacks), "use_distributed_sampler": False}
        trainer_of(folder, *callbacks, **options).fit(module, ckpt_path=resume)
        return [*met, whole(module.net)]

    loaders = [Shuffled] + [torchdata_of] * (find_spec("torchdata") is not None)
    for loader in loaders:
        every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        through = trained(loader, every)
        resumed = trained(loader, resume=str(saved_at(folder)))
        # Step 4 is the first of the second epoch, and has two batches.
        assert len(resumed) == len(through) - BATCHES - 2
        assert all(map(torch.equal, through[BATCHES + 2 :], resumed))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
        dist.barrier()


def saved_at(folder: Path) -> Path:
    """In mid-round and in mid-epoch, with a mean in flight."""
    return folder / "step=4.ckpt"


def best_and_logged(folder: Path) -> None:
    """The best checkpoint has the mean that was validated, fit ends early, and loggers have our metrics."""
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    best = ModelCheckpoint(folder / "best", monitor="val", mode="min")
    # Of a loss that grows.
    early = EarlyStopping("val", patience=1, mode="max", min_delta=1e6)
    module = module_of("local")
    logger = CSVLogger(folder, name="logs", version=0)
    trainer = trainer_of(
        folder,
        best,
        early,
        enable_checkpointing=True,
        max_epochs=9,
        logger=logger,
        log_every_n_steps=1,
    )
    trainer.fit(module)
    assert trainer.current_epoch == 2
    found = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    values = torch.cat([x.flatten().double() for x in found.values()])
    assert any(torch.equal(values, x) for x in module.validated)
    (result,) = trainer.validate(module, ckpt_path="best", verbose=False)
    assert result["val"] == pytest.approx(float(best.best_model_score), rel=1e-6)
    dist.barrier()
    if dist.get_rank() == 0:
        header = (folder / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
        assert {"distoptim/exposed_pct", "distoptim/tau", "distoptim/syncs"} <= set(
            header.split(",")
        )


def several(folder: Path) -> None:
    """Two optimizers, one of which steps every other time; validation and the end see the mean of both."""
    import lightning.pytorch as pl

    class Two(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = net_of(0.0)

        def training_step(self, _: torch.Tensor, index: int) -> None:
            first, second = self.optimizers()
            self.manual_backward(self.net(batches(dist.get_rank())[index]).square().mean())
            first.step()
            if index % 2:
                second.step()
            first.zero_grad()
            second.zero_grad()

        def configure_optimizers(self) -> Any:
            parts = (self.net[0], self.net[3])
            return [
                ours(name, torch.optim.SGD([*part.parameters(), *more], lr=0.1), module=self)
                for name, part, more in zip(
                    ("local", "overlap"), parts, ([], [*self.net[1].parameters()]), strict=True
                )
            ]

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Own(0), batch_size=None)

    module = Two()
    trainer = trainer_of(folder, accumulate_grad_batches=1, gradient_clip_val=None)
    trainer.fit(module)
    steps = [inspect(o).step for o in trainer.strategy.averaging.values()]
    assert steps == [BATCHES * EPOCHS, BATCHES // 2 * EPOCHS]
    assert {"distoptim/tau/0", "distoptim/tau/1"} <= trainer.callback_metrics.keys()
    equal_everywhere(whole(module.net))


def weights_alone(folder: Path) -> None:
    """A checkpoint in which nothing is of ours."""
    plain = folder / "plain.ckpt"
    if dist.get_rank() == 0:
        shutil.copy(saved_at(folder), plain)
    dist.barrier()
    module = module_of("overlap")
    trainer = trainer_of(folder)
    with TestCase().assertLogs("distoptim", "WARNING") as said:
        trainer.fit(module, ckpt_path=str(plain))
    assert [record.getMessage() for record in said.records] == [
        f"{plain}.workers has no state of distoptim: a new run starts from its weights"
    ]
    (optimizer,) = trainer.strategy.averaging.values()
    assert optimizer.local_step == 2


def refused(folder: Path) -> None:
    from distoptim.integrations.lightning import AveragingCallback

    module = module_of("local")
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="AveragingStrategy with SGD, whose parameters would stay"):
        trainer_of(folder).fit(module)
    with pytest.raises(ValueError, match="AveragingCallback with DDPStrategy: allowed is"):
        trainer_of(folder, strategy="ddp", callbacks=[AveragingCallback()]).fit(module)
    module = module_of("local")
    step = module.optimizer_step

    def step_and_average(epoch: int, index: int, optimizer: Any, closure: Any) -> None:
        step(epoch, index, optimizer, closure)
        optimizer.optimizer.average()

    module.optimizer_step = step_and_average
    with (
        pytest.warns(RuntimeWarning, match="AveragingStrategy without AveragingCallback"),
        pytest.raises(RuntimeError, match="was called beside AveragingStrategy"),
    ):
        trainer_of(folder, callbacks=[]).fit(module)


def plain_strategy(folder: Path) -> None:
    """Lightning's own strategy puts DDP around the model, which the first step tells."""
    trainer = trainer_of(folder, strategy="ddp", callbacks=[])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(module_of("local"))
    about = [str(w.message) for w in told if "DistributedDataParallel is around" in str(w.message)]
    assert len(about) == 1
    assert "lightning.AveragingStrategy" in about[0]


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def begin(folder: Path, devices: int) -> None:
    """Start the other processes, where nobody has, and make the process group, as each `fit` does."""
    strategy = trainer_of(folder, devices=devices).strategy
    strategy.launcher.launch(strategy.setup_environment)


def two(folder: Path) -> None:
    """All cases for two workers, one after the other; `launched.py` calls it too."""
    quiet()
    begin(folder, 2)
    right_numbers(folder)
    skipped_by_one(folder / "skipped")
    checkpoints(folder)
    data_order(folder / "order")
    best_and_logged(folder)
    several(folder)
    weights_alone(folder)
    refused(folder)
    plain_strategy(folder)
    names: dict[str, Any] = {}
    exec(compile(of_the_page("lightning"), "lightning.md", "exec", dont_inherit=True), names)
    dist.destroy_process_group()
    print("lightning: all cases have passed")


def _two(rank: int, folder: Path) -> None:
    two(folder)


def _four(rank: int, folder: Path) -> None:
    """Twice as many workers have right numbers, and start from the anchor of what two have saved."""
    quiet()
    begin(folder, 4)
    right_numbers(folder, CASES[1:2])
    module = module_of("overlap")
    trainer = trainer_of(folder)
    found = []

    def look() -> None:
        (optimizer,) = trainer.strategy.averaging.values()
        anchors = inspect(optimizer).anchors()
        assert anchors is not None
        assert torch.equal(flat(module.net), anchors)
        equal_everywhere(anchors)
        found.append(anchors)

    module.on_train_start = look
    trainer.fit(module, ckpt_path=str(saved_at(folder)))
    assert found
    dist.destroy_process_group()


def test_it_equals_local_updates_by_hand_and_resumes(tmp_path: Path) -> None:
    run(_two, 2, tmp_path, backend=None)
    run(_four, 4, tmp_path, backend=None)
