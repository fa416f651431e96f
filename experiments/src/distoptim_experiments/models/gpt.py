"""A small GPT over bytes.

Pre-norm blocks of causal attention with rotary places and a perceptron, tied embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BYTES = 256


class GPT(nn.Module):
    """Tokens [batch, positions] -> scores of the next token [batch, classes, positions], as
    `cross_entropy` takes them.

    Args:
        classes: different tokens.
        layers, width, heads: its size; the default has 0.82 million parameters. A head's width must
            be even.
    """

    def __init__(
        self, classes: int = BYTES, *, layers: int = 4, width: int = 128, heads: int = 4
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(classes, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        # GPT-2's 0.02 is for its width of 768. In narrower models it leaves every branch weak, and
        # they hardly learn.
        std = 0.02 * (768 / width) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2: the branches that add to the residual stream begin small, so that depth
                # does not widen it.
                nn.init.normal_(
                    p, std=std / (2 * layers) ** 0.5 if name.endswith("out.weight") else std
                )

    def forward(self, tokens: Tensor) -> Tensor:
        """The score of every token at every next position."""
        scores = functional.linear(self.norm(self.blocks(self.tokens(tokens))), self.tokens.weight)
        return scores.transpose(1, 2)


class Block(nn.Module):
    """x + attention(norm(x)), then the same with a perceptron of one hidden layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.perceptron = Perceptron(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape as x."""
        x = x + self.attention(self.norms[0](x))
        y: Tensor = x + self.perceptron(self.norms[1](x))
        return y


class Attention(nn.Module):
    """Every position attends to itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape as x."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


def rotated(x: Tensor) -> Tensor:
    """Pairs of features turned by angles that grow with the position, so that q k depends on the
    distance alone.

    With learned embeddings of positions instead, the small model needs several times the steps to
    look beyond the last
    byte. Source: Su et al. 2021 (arXiv 2104.09864).
    """
    positions = x.shape[-2]
    pairs = x.shape[-1] // 2
    speeds = 10000.0 ** (-torch.arange(pairs, device=x.device) / pairs)
    angles = torch.arange(positions, device=x.device).unsqueeze(1) * speeds
    cos = angles.cos().to(x.dtype)
    sin = angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Perceptron(nn.Module):
    """Four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape as x."""
        y: Tensor = self.out(functional.gelu(self.hidden(x)))
        return y


def build(window: torch.Size, classes: int) -> nn.Module:
    """4 layers of width 128; 0.82 million parameters, for windows of any length."""
    return GPT(classes)


def build_small(window: torch.Size, classes: int) -> nn.Module:
    """2 layers of width 64; 0.12 million parameters, for windows of any length."""
    return GPT(classes, layers=2, width=64)
