"""The GPT: its size, its first weights, and what it can see."""

from __future__ import annotations

import pytest
import torch
from distoptim_experiments.data import text
from distoptim_experiments.models import gpt
from distoptim_experiments.models import registry as models

WINDOW = torch.Size([text.CONTEXT])


@pytest.mark.parametrize(("name", "layers", "width"), [("gpt", 4, 128), ("gpt-small", 2, 64)])
def test_the_number_of_parameters(name, layers, width):
    count = sum(p.numel() for p in models.build(name, WINDOW, 256).parameters())
    assert count == 256 * width + layers * (12 * width**2 + 2 * width) + width


def test_weights_begin_as_in_gpt_2_at_its_width():
    torch.manual_seed(0)
    stds = {
        name: float(p.detach().std()) for name, p in gpt.GPT(layers=2, width=768).named_parameters()
    }
    assert stds["tokens.weight"] == pytest.approx(0.02, rel=0.02)
    assert stds["blocks.1.perceptron.hidden.weight"] == pytest.approx(0.02, rel=0.02)
    # Four branches add to the residual stream.
    assert stds["blocks.1.perceptron.out.weight"] == pytest.approx(0.02 / 2, rel=0.02)
    assert stds["blocks.0.attention.out.weight"] == pytest.approx(0.02 / 2, rel=0.02)


@pytest.mark.parametrize("width", [32, 64, 512])
def test_the_width_changes_neither_how_much_a_branch_says_nor_the_spread_of_the_scores(width):
    torch.manual_seed(0)
    model = gpt.GPT(layers=2, width=width)
    tokens = torch.arange(200, 256).repeat(8, 1)
    x = model.norm(torch.randn(8, 64, width))
    with torch.no_grad():
        added, scores = model.blocks[0].perceptron(x), model(tokens)[:, :200]
    # Of a normed input 0.554 times the rms of the GELU of N(0, 0.554^2), 0.327; of bytes that were
    # not read 0.554.
    assert float(added.std()) == pytest.approx(0.181, rel=0.06)
    assert float(scores.std()) == pytest.approx(0.554, rel=0.1)


def test_attention_knows_distances_and_no_places():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16)
    turned = [gpt.rotated(x.expand(50, 16)) for x in (q, k)]
    products = turned[0] @ turned[1].T
    for distance in (0, 1, 7, 40):
        same = products.diagonal(-distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-4)
    assert float(products[0, 0]) == pytest.approx(float(q @ k), abs=1e-4)
    assert float((products[1, 0] - products[0, 0]).abs()) > 0.1


def test_a_later_byte_changes_no_earlier_score():
    torch.manual_seed(0)
    model = models.build("gpt-small", WINDOW, 256)
    tokens = torch.randint(256, (2, 20))
    changed = tokens.clone()
    changed[:, 11] ^= 1
    a, b = model(tokens), model(changed)
    assert a.shape == (2, 256, 20)
    assert torch.equal(a[:, :, :11], b[:, :, :11])
    assert all(not torch.equal(a[:, :, t], b[:, :, t]) for t in range(11, 20))
