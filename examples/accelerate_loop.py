"""A loop with Hugging Face's Accelerate, which accumulates gradients, clips them and saves checkpoints.

torchrun --nproc-per-node=2 examples/accelerate_loop.py

The lines that differ from a script without distoptim are marked with "+".
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distoptim
import distoptim.integrations.accelerate  # +

EPOCHS = 2
SAMPLES = 8192


def main() -> None:
    """Train a regression; the main process prints the loss of the workers' mean."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    data = torch.randn(SAMPLES, 16)
    loader = DataLoader(TensorDataset(data, data[:, :1].sin()), batch_size=16, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    model.to(accelerator.device)  # + before the optimizer is made
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = distoptim.OverlapLocalSGD(optimizer, tau=8, module=model)  # +
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * SAMPLES // 32)
    # + in place of accelerator.prepare(model, optimizer, loader, schedule)
    model, optimizer, loader, schedule = distoptim.integrations.accelerate.prepare(
        accelerator, model, optimizer, loader, schedule
    )
    for _ in range(EPOCHS):
        for batch, target in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(batch), target))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()  # counts, and averages every 8 of them
                schedule.step()
                optimizer.zero_grad()
        accelerator.save_state("checkpoint")  # the workers' mean, and each worker's own
    optimizer.consolidate(model)  # + all workers hold the mean from here on
    with torch.no_grad():
        unseen = torch.randn(512, 16, generator=torch.Generator().manual_seed(-1))
        loss = nn.functional.mse_loss(model(unseen), unseen[:, :1].sin()).item()
    accelerator.print(f"loss of the mean: {loss:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
