import pytest
import torch
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.data import datasets as data
from distoptim_experiments.data import partition, text
from distoptim_experiments.machines import Machines
from distoptim_experiments.models import gpt
from distoptim_experiments.models import registry as models
from distoptim_experiments.training import checkpoint, methods
from distoptim_experiments.training.loop import Run
from distoptim_experiments.training.virtual import VirtualRun
from distoptim_experiments.training.world import StopSignals, World

from distoptim.testing.inspection import inspect
from distoptim.testing.processes import run

WINDOW = torch.Size([text.CONTEXT])


@pytest.fixture
def folder(tmp_path):
    """Two files of a text that is easy to learn."""
    made = tmp_path / "text"
    made.mkdir()
    (made / "b.txt").write_bytes(b"to be or not to be, \xff " * 400)
    (made / "a.txt").write_bytes(b"that is the question. " * 300)
    (made / "notes.md").write_bytes(b"!" * 5000)
    return made


def config_of(folder, **changes):
    return RunConfig(
        **{
            "data": str(folder),
            "model": "gpt-small",
            "workers": 2,
            "tau": 3,
            "batch_size": 4,
            "steps": 6,
            "optimizer": "adamw",
            "lr": 3e-3,
            "clip_norm": 1.0,
            "log_every": 1,
            "evaluate_every": 4,
            "checkpoint_every": 0,
            **changes,
        }
    )


def test_windows_and_what_follows_them(folder):
    d = data.load(str(folder))
    whole = (folder / "a.txt").read_bytes(), (folder / "b.txt").read_bytes()
    train = b"".join(part[: len(part) * 9 // 10] for part in whole)
    test = b"".join(part[len(part) * 9 // 10 :] for part in whole)
    assert d.classes == 256
    for inputs, follows, expected in (
        (d.train_images, d.train_labels, train),
        (d.test_images, d.test_labels, test),
    ):
        n = inputs.numel()
        assert len(expected) - 1 - text.CONTEXT < n <= len(expected) - 1
        assert bytes(inputs.flatten().tolist()) == expected[:n]
        assert bytes(follows.flatten().tolist()) == expected[1 : n + 1]


def test_one_file_is_a_text_too(folder):
    assert len(data.load(str(folder / "notes.md")).train_images) == (4500 - 1) // text.CONTEXT


def test_workers_see_different_windows(folder):
    labels = data.load(str(folder)).train_labels
    shards = [set(s.tolist()) for s in partition.partition("iid", labels, workers=3, seed=0)]
    assert sum(map(len, shards)) == len(set.union(*shards)) == len(labels)


def test_texts_that_will_not_do_are_named(folder, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "none").mkdir()
    for path, message in (
        (tmp_path / "no", "allowed is one of cifar10.*digits.*or a file or folder of text"),
        (tmp_path / "none", r"no \*.txt file"),
        (tmp_path / "empty.txt", "0 bytes.*too few"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            data.load(str(path))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "digits"}, "data='digits' with model='gpt-small': allowed is a file or folder"),
        ({"model": "cnn"}, "allowed is one of cifar10.*digits.*text goes with model=gpt"),
        ({"optimizer": "adam"}, "optimizer='adam'"),
        ({"clip_norm": 0.0}, "clip_norm=0"),
        ({"lr": float("nan")}, "lr=nan"),
    ],
)
def test_bad_combinations_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(folder, **changes)


def test_fragments_can_be_asked_for(folder):
    made = VirtualRun(
        config_of(folder, algorithm="streaming-diloco", options={"fragments": 2}),
        Machines(),
        threads=1,
    )
    assert len(inspect(made.cluster.optimizers[0]).fragments) == 2


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
    turned = [gpt._rotated(x.expand(50, 16)) for x in (q, k)]
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


def test_an_untrained_model_knows_nothing_and_says_so_every_time(folder):
    d = data.load(str(folder))
    torch.manual_seed(0)
    model = models.build("gpt-small", WINDOW, 256)
    once, again = (methods.evaluate(model, d.test_images, d.test_labels) for _ in range(2))
    assert once == again
    # Nats per byte; log 256 = 5.545, and a little more, since tied embeddings favour the byte just
    # read.
    assert 5.545 < once["test_loss"] < 5.8
    assert 0 <= once["test_accuracy"] < 0.2


def test_the_gradient_is_clipped_before_the_step(folder):
    run = VirtualRun(
        config_of(
            folder,
            optimizer="sgd",
            momentum=0.0,
            nesterov=False,
            weight_decay=0.0,
            lr=1.0,
            clip_norm=0.01,
            workers=1,
            algorithm="local-sgd",
        ),
        Machines(),
        threads=1,
    )
    before = [p.detach().clone() for p in run.cluster.models[0].parameters()]
    run.cluster.step(run._loss)
    after = [p.detach() for p in run.cluster.models[0].parameters()]
    moved = torch.cat([(p - q).flatten() for p, q in zip(after, before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_virtual_workers_learn_the_text(folder, dtype):
    lines = []
    # A CPU may have no bfloat16 and take ten times as long for it.
    steps, loss = {"float32": (40, 2.5), "bfloat16": (10, 3.7)}[dtype]
    VirtualRun(
        config_of(folder, steps=steps, log_every=5, batch_size=8, dtype=dtype),
        Machines(),
        threads=1,
    ).train(lines.append)
    losses = [line.loss for line in lines if line.kind == "log"]
    assert losses[0] > 4
    assert losses[-1] < loss
    assert lines[-1].test_loss < loss


def train(config, folder, world, *, resume=False):
    part = Run(config, world, folder, resume=resume)
    part.train(StopSignals())
    part.close()


def both_ways(rank, text_folder, folder, algorithm):
    world, config = World(), config_of(text_folder, algorithm=algorithm)
    train(config, folder / "whole", world)
    train(config.replace(steps=4), folder / "parts", world)
    train(config, folder / "parts", world, resume=True)
    whole, parts = (checkpoint.load(folder / name, world=world)[0] for name in ("whole", "parts"))
    return [
        all(torch.equal(whole["model"][k], parts["model"][k]) for k in whole["model"]),
        whole["losses"] == parts["losses"],
    ]


@pytest.mark.parametrize("algorithm", ["overlap-local-sgd", "ddp"])
def test_a_resumed_run_is_bit_equal_and_virtual_workers_agree(folder, tmp_path, algorithm):
    assert run(both_ways, 2, folder, tmp_path, algorithm) == [[True, True]] * 2
    lines = []
    VirtualRun(config_of(folder, algorithm=algorithm), Machines(), threads=1).train(lines.append)
    summary = records.read(tmp_path / "whole").summary
    assert summary.test_loss == pytest.approx(lines[-1].test_loss, rel=1e-4)


def test_the_command_trains_a_gpt(folder, invoke, tmp_path):
    data = ("--model", "gpt-small", "--data", folder, "--workers", "2", "--batch-size", "4")
    optimizer = ("--optimizer", "adamw", "--lr", "1e-3", "--clip-norm", "1")
    code, _, err = invoke("train", *data, *optimizer, "--steps", "4", "--folder", tmp_path / "run")
    assert code == 0, err
    assert records.read(tmp_path / "run").config.optimizer == "adamw"
