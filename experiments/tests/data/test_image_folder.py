import pytest
import torch
from distoptim_experiments.config import RunConfig
from distoptim_experiments.data import datasets as data
from distoptim_experiments.data import image_folder
from PIL import Image

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def folder(tmp_path):
    """Two classes: cats are red and wide, dogs blue and high; PNG and JPEG."""
    for part, n in (("train", 2), ("test", 1)):
        for name, colour, size, suffix in (
            ("dog", BLUE, (20, 40), "png"),
            ("cat", RED, (48, 16), "JPG"),
        ):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", size, colour).save(tmp_path / part / name / f"{i}.{suffix}")
            (tmp_path / part / name / "notes.txt").write_text("no image")
    return tmp_path


def test_classes_are_numbered_by_name_and_images_have_one_size(folder):
    images, labels, test_images, test_labels = image_folder.read_folder(folder, size=8)
    assert images.shape == (4, 3, 8, 8)
    assert labels.tolist() == [0, 0, 1, 1]
    assert test_labels.tolist() == [0, 1]
    assert test_images[1, :, 0, 0].tolist() == [0, 0, 1]
    # JPEG is not exact.
    assert torch.allclose(test_images[0, :, 4, 4], torch.tensor([1.0, 0.0, 0.0]), atol=0.02)
    assert data.load("image-folder:16", folder).train_images.shape == (4, 3, 16, 16)
    assert data.load("image-folder", folder).train_images.shape == (4, 3, 64, 64)


def test_the_middle_is_cut_out_row_by_row(folder):
    image = Image.new("L", (16, 8))
    image.putdata([10 * x + y for y in range(8) for x in range(16)])
    image.save(folder / "test" / "cat" / "0.JPG", "PNG")
    pixels = image_folder.read_folder(folder, size=8)[2][0] * 255
    # A grey image has its value in all three colours; of 16 columns those from 4 to 11 are left.
    assert pixels[:, 2, 3].round().tolist() == [72.0] * 3


def spoil(folder, fault):
    if fault == "unreadable":
        (folder / "train" / "dog" / "1.png").write_bytes(b"GIF89a, not really")
    elif fault == "cut off":
        path = folder / "train" / "dog" / "1.png"
        path.write_bytes(path.read_bytes()[:60])
    elif fault == "empty":
        for path in (folder / "test" / "cat").iterdir():
            path.unlink()
    elif fault == "differ":
        (folder / "test" / "dog").rename(folder / "test" / "wolf")
    elif fault == "no test":
        (folder / "test").rename(folder / "validation")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unreadable", r"train/dog/1\.png: cannot be read as an image"),
        ("cut off", r"train/dog/1\.png: cannot be read as an image"),
        ("empty", r"test/cat: a class without images"),
        ("differ", r"same classes: dog only in train, wolf only in test"),
        ("no test", r"test: no such folder"),
    ],
)
def test_faults_are_named_in_one_line(folder, fault, message):
    spoil(folder, fault)
    with pytest.raises(ValueError, match=message) as error:
        data.load("image-folder", folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", ["", "3", "x", "64.0"])
def test_a_wrong_size_is_refused(size):
    with pytest.raises(ValueError, match=r"image-folder:.*allowed is an integer, from 4 to 1024"):
        RunConfig(data=f"image-folder:{size}")


def test_without_a_folder_the_expected_ones_are_named():
    with pytest.raises(ValueError, match=r"--data-dir.*train/CLASS and test/CLASS"):
        data.load("image-folder")
