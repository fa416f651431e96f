import pytest
import torch
from distoptim_experiments.config import RunConfig
from distoptim_experiments.data import datasets as data
from distoptim_experiments.data.augment import crop_and_flip
from torch.nn import functional


def test_every_image_is_a_crop_of_its_padded_self_mirrored_or_not():
    images = torch.rand(200, 3, 6, 5)
    out = crop_and_flip(images, torch.Generator().manual_seed(0), padding=2)
    seen = set()
    for before, after in zip(functional.pad(images, [2] * 4), out, strict=True):
        places = {
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(
                after.flip(2) if flip else after, before[:, top : top + 6, left : left + 5]
            )
        }
        assert len(places) == 1
        seen |= places
    assert len(seen) > 45


def test_augmented_batches_go_on_exactly():
    def batches(seed=1):
        images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return data.Batches(images, torch.arange(10), batch_size=4, seed=seed, augment=True)

    a, b = batches(), batches(seed=2)
    for _ in range(4):
        next(a)
    b.load_state_dict(a.state_dict())
    for _ in range(5):
        (x, y), (u, v) = next(a), next(b)
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert not torch.equal(next(batches())[0], next(batches(seed=2))[0])


def test_labels_and_order_are_those_without_augmentation():
    images = torch.rand(10, 1, 8, 8)
    plain, augmented = (
        data.Batches(images, torch.arange(10), batch_size=4, seed=1, augment=a)
        for a in (False, True)
    )
    for _ in range(6):
        assert torch.equal(next(plain)[1], next(augmented)[1])


def test_text_is_not_augmented(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 100)
    with pytest.raises(ValueError, match="augment=True: only images"):
        RunConfig(data=str(tmp_path), model="gpt-small", augment=True)
