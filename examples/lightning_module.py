"""A LightningModule whose optimizer is one of distoptim; Lightning starts the second process itself.

python examples/lightning_module.py

The lines that differ from a script without distoptim are marked with "+".
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import distoptim  # +
from distoptim.integrations.lightning import AveragingCallback, AveragingStrategy  # +


class Regression(LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

    def loss(self, batch: list[Tensor]) -> Tensor:
        data, target = batch
        return nn.functional.mse_loss(self.network(data), target)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("loss of the mean", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        inner = torch.optim.AdamW(self.parameters(), lr=0.01)
        return distoptim.OverlapLocalSGD(inner, tau=8, module=self)  # + around the optimizer


def loader(samples: int, seed: int) -> DataLoader:
    """Numbers, and the sine of the first one of each sample."""
    data = torch.randn(samples, 16, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(data, data[:, :1].sin()), batch_size=32, shuffle=seed > 0)


def main() -> None:
    """Train; rank 0 prints the validation loss, which is that of the workers' mean."""
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        max_epochs=2,
        strategy=AveragingStrategy(),  # + in place of "ddp"
        callbacks=[AveragingCallback()],  # + validation sees the workers' mean
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(Regression(), loader(8192, seed=1), loader(512, seed=0))
    if trainer.is_global_zero:
        print(f"loss of the mean: {trainer.callback_metrics['loss of the mean']:.3f}")


if __name__ == "__main__":
    main()
