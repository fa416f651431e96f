import pytest
import torch
from distoptim_experiments.models import registry as models


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("resnet18", 10, 11_173_962),
        ("vgg16", 10, 14_728_266),
        ("wrn28-10", 10, 36_479_194),
        ("resnet18", 100, 11_173_962 + 90 * 513),
    ],
)
def test_parameter_counts_are_the_published_ones(name, classes, parameters):
    with torch.device("meta"):
        model = models.build(name, torch.Size([3, 32, 32]), classes)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_vgg16_refuses_images_it_would_halve_away():
    with pytest.raises(ValueError, match=r"vgg16.*28x28 is under 32x32"):
        models.build("vgg16", torch.Size([1, 28, 28]), 10)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        ("mlp", (1, 8, 8), 10, 4_810),
        ("cnn", (1, 8, 8), 10, 129_178),
        ("cnn-small", (1, 28, 28), 10, 89_914),
        ("gpt", (128,), 256, 820_352),
        ("gpt-small", (128,), 256, 115_008),
    ],
)
def test_parameter_counts_of_our_own_models(name, shape, classes, parameters):
    with torch.device("meta"):
        model = models.build(name, torch.Size(shape), classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_model_has_its_count_here():
    counted = {
        mark.args[1][i][0]
        for test in (
            test_parameter_counts_are_the_published_ones,
            test_parameter_counts_of_our_own_models,
        )
        for mark in test.pytestmark
        for i in range(len(mark.args[1]))
    }
    assert counted == set(models.MODELS)
