"""Hugging Face's Trainer, with AdamW as the arguments say, averaged in the background.

torchrun --nproc-per-node=2 examples/transformers_trainer.py

The lines that differ from a script without distoptim are marked with "+".
"""

from __future__ import annotations

import sys

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

import distoptim  # +
from distoptim.integrations.transformers import AveragingTrainer  # +

LENGTH = 32


class Counting(Dataset):
    """Numbers that go on from a random one; after 63 comes 0."""

    def __init__(self, samples: int, seed: int) -> None:
        first = torch.randint(64, (samples, 1), generator=torch.Generator().manual_seed(seed))
        self.tokens = (first + torch.arange(LENGTH)) % 64

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def main(steps: int = 200) -> None:
    """Train a small GPT-2; rank 0 prints the loss of the workers' mean."""
    args = TrainingArguments(
        output_dir="trained",
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=50,
        save_steps=100,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,  # leave it away on GPUs
    )
    torch.manual_seed(0)
    size = GPT2Config(vocab_size=64, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2)
    trainer = AveragingTrainer(  # + in place of Trainer
        model=GPT2LMHeadModel(size),
        args=args,
        train_dataset=Counting(4096, seed=1),
        eval_dataset=Counting(256, seed=2),
        averaging=lambda inner: distoptim.OverlapLocalSGD(inner, tau=8),  # +
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model("trained/mean")
    if args.process_index == 0:
        print(f"loss of the mean: {loss:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
