"""A small GPT on any text: AdamW, and Streaming DiLoCo whose means travel for five local steps.

torchrun --nproc-per-node=2 examples/gpt_text.py FILE [STEPS]

A byte is a token. The test is the start of the last tenth of the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distoptim

CONTEXT = 64  # bytes
BATCH = 8  # of them in a step, on each worker
WIDTH = 64


class GPT(nn.Module):
    """Blocks with the norm in front; the embedding of a byte also says how likely it is."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        for embedding in (self.bytes, self.places):
            nn.init.normal_(embedding.weight, std=0.05)
        block = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(WIDTH), False)
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the byte after each."""
        x = self.bytes(text) + self.places.weight
        return self.blocks(x, mask=self.mask, is_causal=True) @ self.bytes.weight.T

    def loss(self, windows: Tensor) -> Tensor:
        """Nats per byte."""
        logits = self(windows[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def main(file: str, steps: int = 1000) -> None:
    """Train; rank 0 prints the test loss of the workers' mean and saves it."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank = dist.get_rank()
    torch.manual_seed(rank)
    text = torch.frombuffer(bytearray(Path(file).read_bytes()), dtype=torch.uint8).long()
    windows = text.unfold(0, CONTEXT + 1, CONTEXT)
    own = windows[: len(windows) * 9 // 10][rank :: dist.get_world_size()]
    unseen = windows[len(windows) * 9 // 10 :][:256]
    model = GPT()
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    optimizer = distoptim.StreamingDiLoCo(
        inner, tau=10, delay=5, outer_lr=0.7, outer_momentum=0.5, module=model
    )
    for _ in range(steps):
        model.loss(own[torch.randint(len(own), (BATCH,))]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()
    with optimizer.averaged(model), torch.no_grad():
        if rank == 0:
            print(f"loss of the mean: {model.loss(unseen).item():.3f} nats per byte")
            torch.save(model.state_dict(), "gpt.pt")
    optimizer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
