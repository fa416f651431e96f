"""The report of a folder of records: its figures, its files, and what is wrong with the records."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser

import matplotlib
import pandas as pd
import pytest
from distoptim_experiments import frames
from distoptim_experiments.report import drawing, front, page, report
from distoptim_experiments.report import runs as grid_of

from distoptim.cli import application, main
from experiments.tests.report.records import METHODS, grid, lines, put


def row(text, *cells):
    """The first row of the Markdown that begins with these cells, without them."""
    start = "| " + " | ".join(cells) + " | "
    found = next(line for line in text.splitlines() if line.startswith(start))
    return found.removeprefix(start).removesuffix(" |").split(" | ")


def read(folder):
    return grid_of.named(frames.read(folder))


def final(folder):
    found = read(folder).ended
    return found[found.stage == frames.FINAL]


@pytest.fixture
def undrawn(monkeypatch):
    """Reports with empty pictures, for what is in their words and files: four take a second to draw."""
    monkeypatch.setattr(drawing, "png", lambda *_, **__: b"\x89PNG")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Markdown and HTML of a whole grid, with slow-downs, trials, an unfinished and a damaged record."""
    folder = tmp_path_factory.mktemp("grid")
    grid(folder, slowdowns=("none", "exponential"))
    for lr, accuracy in ((0.03, 0.7), (0.1, 0.8), (0.3, 0.75)):
        put(folder / "trials", f"t{lr}", lines(lr=lr, accuracy=accuracy))
    put(folder / "final", "cut-short", lines()[:-1])
    put(folder / "final", "on-its-way", lines()[:1])
    put(folder / "final", "broken", lines()).write_text('{"kind": "start"\n{}\n')
    out = folder / "out"
    return [path.read_text() for path in report.write(read(folder), out)], out


def test_the_table_tells_mean_deviation_seeds_best_and_diverged(made):
    (text, page), _ = made
    iid, skewed = text.split("**iid**")[1], text.split("**label-skew**")[1]
    # Seeds .91 - .01, + .002, + .004: mean .902, sample deviation .002.
    assert row(iid, "Local SGD") == ["90.20 ± 0.20", "87.20 ± 0.20"]
    assert row(iid, "Overlap-Local-SGD")[0] == "**92.20 ± 0.20**"
    assert row(iid, "sync") == ["89.70 ± 0.20", "**89.70 ± 0.20**"]
    assert row(skewed, "CoCoD-SGD") == ["90.20 ± 0.20", "diverged (3)"]
    assert "<td>diverged (3)</td>" in page
    assert "<td><strong>92.20 ± 0.20</strong></td>" in page
    assert "mean ± standard deviation over 3 seeds." in text
    workers = text.split("## Test accuracy of single workers")[1]
    assert "measured on the first 1000 test images or 100 windows" in workers
    assert row(workers, "Local SGD") == ["80.20 ± 0.20", "77.20 ± 0.20"]


def test_text_is_judged_by_its_loss(tmp_path):
    for tau, losses in ((2, (2.1, 2.2)), (8, (2.4, 2.5))):
        for seed, loss in enumerate(losses):
            for label, more in (("Local SGD", 0), ("CoCoD-SGD", 0.05)):
                made = lines(label=label, tau=tau, seed=seed, model="gpt-small", data="plays")
                made[-1]["test_loss"] = loss + more
                put(tmp_path / "final", f"{label}-{tau}-{seed}", made)
    for lr, loss, accuracy in ((0.03, 2.2, 0.5), (0.1, 2.1, 0.4)):
        made = lines(lr=lr, model="gpt-small", data="plays")
        made[-1] |= {"validation_loss": loss, "validation_accuracy": accuracy}
        put(tmp_path / "trials", f"t{lr}", made)
    text = report.write(read(tmp_path), tmp_path / "out")[0].read_text()
    assert (
        "Loss on the whole test set in nats per byte, mean ± standard deviation over 2 seeds."
        in text
    )
    quality, tried = text.split("## Test loss of the averaged model")[1].split(
        "## Learning rates tried"
    )
    assert row(quality, "Local SGD") == ["**2.150 ± 0.071**", "**2.450 ± 0.071**"]
    assert row(quality, "CoCoD-SGD") == ["2.200 ± 0.071", "2.500 ± 0.071"]
    assert row(tried, "Local SGD", "2") == ["2.200", "**2.100**", "0.1"]


def test_learning_rates_with_the_best_and_the_one_used(made):
    text = made[0][0].split("## Learning rates tried")[1]
    assert row(text, "method", "tau") == ["lr 0.03", "lr 0.1", "lr 0.3", "used"]
    assert row(text, "Local SGD", "2") == ["71.00", "**81.00**", "76.00", "0.1"]


def test_what_is_left_out_is_named(made):
    text = made[0][0].split("## What was left out")[1].split("##")[0]
    assert "final/broken/record.jsonl:1: not a line of a record: Invalid JSON" in text
    assert "2 unfinished, left out: final/cut-short, final/on-its-way." in text
    assert "84 final runs (6 diverged); 3 runs to choose learning rates." in made[0][0]


class Checked(HTMLParser):
    """Tags are closed in order, ids are used once."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_asks_for_nothing(made):
    text = made[0][1]
    checked = Checked()
    checked.feed(text)
    assert checked.open == []
    assert len(checked.links) == 5
    assert all(link.startswith("data:image/png;base64,iVBORw0KGgo") for link in checked.links)
    assert not re.findall(r"https?:|@import|url\(", text)
    assert "some &lt;CPU&gt;" in text


def test_markdown_shows_its_pictures(made):
    shown = re.findall(r"^!\[[^\]]+\]\(report-pictures/(\w+)\.png\)$", made[0][0], re.MULTILINE)
    assert shown == ["epochs", "time", "front", "costs", "stragglers"]
    for name in shown:
        assert (made[1] / page.PICTURES / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_what_runs_say_is_shown_as_it_is(tmp_path):
    evil = "<script>alert(1)</script> [x](javascript:0)\n# heading | `code` *bold*"
    for place, changed in {
        "label": lines(),
        "model": lines(model=evil),
        "processor": lines(tau=8),
    }.items():
        if place == "label":
            changed[0]["label"] = evil
        elif place == "processor":
            changed[0]["surroundings"]["machine"]["processor"] = evil
        put(tmp_path, place, changed)
    text, whole = (path.read_text() for path in report.write(read(tmp_path), tmp_path))
    # The first line is the report's own.
    assert re.sub(r"&lt;script", "", text.split("\n", 1)[1]).count("<") == 0
    assert "\n# heading" not in text
    assert not re.search(r"(?<!\\)[`|*]\s*(?:code|bold|heading)", text)
    assert not re.search(r"(?<!\\)\]\(javascript", text)
    assert "&lt;script" in text
    assert "<script" not in whole
    assert "&lt;script" in whole


def drawn(monkeypatch, draw):
    """The axes of a picture, as they are when it is written."""
    kept = []

    def keep(fill, rows, columns, **_):
        matplotlib.use("Agg")
        figure, axes = matplotlib.pyplot.subplots(
            rows, columns, figsize=(11, 5), squeeze=False, layout="constrained"
        )
        fill(axes)
        figure.draw_without_rendering()
        kept.extend(axes.flat)

    monkeypatch.setattr(drawing, "png", keep)
    draw()
    return kept


def texts(axis):
    return [text for text in axis.texts if text.get_text()]


def boxes(axis):
    return [text.get_window_extent() for text in texts(axis)]


def test_no_name_leaves_a_picture_or_covers_another(tmp_path, monkeypatch):
    for k, label in enumerate(METHODS):
        for tau in (12, 34, 56):
            # In a narrow place, as overlapped methods often are.
            put(
                tmp_path,
                f"{label}{tau}",
                lines(
                    label=label, tau=tau, seconds=6 + k / 50, accuracy=0.8 + tau / 1000 + k / 100
                ),
            )
    (axis,) = drawn(monkeypatch, lambda: front.front(final(tmp_path), "virtual seconds"))
    found = boxes(axis)
    assert len(found) > 2
    inside = axis.figure.bbox
    assert all(b.x0 >= 0 and b.x1 <= inside.x1 and b.y0 >= 0 and b.y1 <= inside.y1 for b in found)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(found, 2))
    legend = axis.figure.legends[-1]
    assert {"tau 12", "tau 34", "tau 56"} < {text.get_text() for text in legend.get_texts()}


def points(*places):
    return pd.DataFrame(places, columns=["seconds", "error"])


def test_the_front_is_what_nothing_beats_in_time_and_error():
    shown = points((2, 5), (1, 9), (3, 5), (2, 6), (4, 1), (5, 1), (1, 9))
    ahead = front.best(shown)
    assert list(zip(ahead.seconds, ahead.error, strict=True)) == [(1, 9), (1, 9), (2, 5), (4, 1)]


def test_an_axis_leaves_out_few_values_and_only_if_they_squeeze_all_others():
    near = [40.0 + k for k in range(15)]
    assert front.limit([*near, 285.0]) == 54.0
    assert front.limit([*near, 54.0 + 14]) == 68.0
    assert front.limit([*near, 285.0, 286.0, 287.0]) == 287.0
    # Of few values none is far; without any extent there is nothing to be squeezed.
    assert front.limit([1.0, 2.0, 99.0]) == 99.0
    assert front.limit([*[40.0] * 15, 285.0]) == 285.0


def test_where_all_runs_diverged_the_picture_is_empty(tmp_path, monkeypatch):
    put(tmp_path, "a", lines(diverged=True))
    (axis,) = drawn(monkeypatch, lambda: front.front(final(tmp_path), "seconds"))
    assert texts(axis) == []
    assert axis.get_ylabel() == "test error, %"


def test_what_is_far_from_all_others_stands_at_the_border_with_its_value(tmp_path, monkeypatch):
    for k, label in enumerate(METHODS):
        for tau in (2, 4, 8):
            of_sync = label == "sync"
            seconds = 300.0 if of_sync else 6.0 + k / tau
            accuracy = 0.9 - tau / 100 + k / 200
            if label == "CoCoD-SGD" and tau == 8:
                accuracy = 0.1
            made = lines(label=label, tau=1 if of_sync else tau, seconds=seconds, accuracy=accuracy)
            put(tmp_path, f"{label}{1 if of_sync else tau}", made)
    (axis,) = drawn(monkeypatch, lambda: front.front(final(tmp_path), "seconds"))
    said = {text.get_text() for text in texts(axis)}
    assert {"sync: 300 s", "CoCoD-SGD: 90.0 % (tau 8)"} <= said
    # So the axes need not reach them.
    assert axis.get_xlim()[1] < 30
    assert axis.get_ylim()[1] < 30


def test_a_method_has_the_same_style_in_all_reports(tmp_path):
    for label in METHODS:
        put(tmp_path / "all", label, lines(label=label))
        put(tmp_path / "one" / label, "x", lines(label=label))
    put(tmp_path / "all", "variant", lines(label="Overlap-Local-SGD", lr=0.5))
    assert grid_of.styles(final(tmp_path / "all")) == {
        "sync": 0,
        "Local SGD": 1,
        "CoCoD-SGD": 3,
        "Overlap-Local-SGD, lr 0.1": 5,
        "Overlap-Local-SGD, lr 0.5": 6,
    }
    alone = [grid_of.styles(final(tmp_path / "one" / label))[label] for label in METHODS]
    assert alone == [0, 1, 3, 5]


def test_runs_of_different_configurations_are_not_mixed(tmp_path):
    for lr in (0.1, 0.2):
        for seed in (0, 1):
            put(tmp_path, f"{lr}-{seed}", lines(lr=lr, seed=seed))
    again = lines(lr=0.2, seed=1, accuracy=0.5)
    again[0]["surroundings"]["date"] = "2026-11-25"
    put(tmp_path, "again", again)
    found = read(tmp_path)
    assert list(found.ended.name) == ["Local SGD, lr 0.1"] * 2 + ["Local SGD, lr 0.2"] * 2
    assert found.ended.test_accuracy.iloc[-1] == 0.5
    assert found.notes == ["1 superseded by a later run of the same configuration, left out"]


@pytest.mark.usefixtures("undrawn")
def test_a_partly_diverged_method_is_marked_and_not_the_best(tmp_path):
    put(tmp_path, "a", lines(accuracy=0.95))
    put(tmp_path, "b", lines(seed=1, diverged=True))
    put(tmp_path, "c", lines(label="CoCoD-SGD"))
    put(tmp_path, "d", lines(label="CoCoD-SGD", seed=1))
    put(tmp_path, "e", lines(label="CoCoD-SGD", seed=2))
    text = report.write(read(tmp_path), tmp_path)[0].read_text()
    assert row(text, "Local SGD") == ["95.00 (1 of 2 diverged)"]
    # Methods have not the same number of seeds, so it is told.
    assert row(text, "CoCoD-SGD") == ["**90.00 ± 0.00 (3)**"]
    assert "over seeds, whose number is in parentheses." in text
    assert "Left out: no run here had random slow-downs." in text


@pytest.mark.usefixtures("undrawn")
def test_experiments_that_cannot_be_compared_are_told_apart(tmp_path):
    for data in ("digits", "fashion-mnist"):
        for label in ("sync", "Local SGD"):
            put(tmp_path / data, label, lines(label=label, data=data))
    text, _ = (path.read_text() for path in report.write(read(tmp_path), tmp_path))
    for data in ("digits", "fashion-mnist"):
        assert (
            f"## cnn-small on {data}, virtual workers: test accuracy of the averaged model" in text
        )
    assert text.count("| sync | **90.00** |") == 2
    assert list(read(tmp_path).ended["style"]) == [0, 1, 0, 1]
    assert {path.stem for path in (tmp_path / "report-pictures").iterdir()} == {
        f"{name}-{i}" for name in ("epochs", "time", "front", "costs") for i in (0, 1)
    }


def test_slow_downs_of_real_workers_are_stragglers(tmp_path):
    for slowdown, mean_ms in (("none", 0.0), ("pareto", 20.0)):
        made = lines(slowdown_ms=mean_ms)
        made[0]["config"]["slowdown"] = slowdown
        del made[0]["machines"]
        put(tmp_path, slowdown, made)
    found = read(tmp_path)
    assert set(found.ended.slowdown) == {"none", "pareto"}
    text = report.write(found, tmp_path)[0].read_text()
    assert row(text, "Local SGD") == ["**90.00**"]
    assert "Seconds of real workers are those of their training steps" in text
    assert (tmp_path / page.PICTURES / "stragglers.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_real_runs_without_worker_accuracy_are_shown(tmp_path):
    made = lines()
    for line in made:
        for name in ("machines", "worker_accuracy"):
            line.pop(name, None)
    put(tmp_path, "a", made)
    text = report.write(read(tmp_path), tmp_path)[0].read_text()
    assert row(text, "Local SGD") == ["**90.00**"]
    assert "Left out: these records have no accuracy of single workers." in text


@pytest.mark.usefixtures("undrawn")
def test_the_command_writes_beside_the_records_or_elsewhere(tmp_path, capsys):
    put(tmp_path / "in", "a", lines())
    put(tmp_path / "in", "b", [{"kind": "start"}])
    for arguments, place in (([], "in"), (["--out", str(tmp_path / "out" / "deep")], "out/deep")):
        application()(["report", str(tmp_path / "in"), *arguments])
        out, err = capsys.readouterr()
        assert f"{place}/report.html" in out
        assert "damaged, left out: b/record.jsonl:1: not a line of a record" in err
        assert (tmp_path / place / "report.md").exists()


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: None, "nothing: no such folder"),
        (lambda folder: folder.mkdir(), "nothing: no finished run there"),
        (
            lambda folder: put(folder, "a", lines()[:-1]),
            "no finished run there; 1 unfinished, left out: a",
        ),
        (
            lambda folder: put(folder, "a", [lines()[0] | {"config": {"tau": "x"}}]),
            "a/record.jsonl:1: not a line of a record: config.tau: Input should be a valid integer",
        ),
        (
            lambda folder: put(folder, "a", [lines()[0], {"kind": "log", "step": 1}]),
            "a/record.jsonl:2: not a line of a record: epoch: Field required",
        ),
        (
            lambda folder: put(folder, "a", [lines()[0], {**lines()[-1], "seconds": None}]),
            "a/record.jsonl:2: not a line of a record: seconds: Input should be a valid number",
        ),
        (lambda folder: put(folder, "a", lines()[1:]), "a/record.jsonl:1: a record begins"),
        (
            lambda folder: put(folder, "", lines()[1:]).rename(folder / "a.record.jsonl"),
            "a.record.jsonl:1: a rec",
        ),
        (
            lambda folder: (folder / "a" / "record.jsonl").mkdir(parents=True),
            "a/record.jsonl: Is a directory",
        ),
    ],
)
def test_a_folder_without_runs_gives_one_line(tmp_path, monkeypatch, capsys, prepare, words):
    prepare(tmp_path / "nothing")
    monkeypatch.setattr("sys.argv", ["distoptim", "report", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.usefixtures("undrawn")
def test_a_file_in_the_way_gives_one_line(tmp_path):
    put(tmp_path, "a", lines())
    (tmp_path / "x").write_text(json.dumps(1))
    with pytest.raises(ValueError, match=r"x.*: Not a directory"):
        report.write(read(tmp_path), tmp_path / "x")


def test_a_file_of_the_users_is_not_overwritten_but_a_report_is(tmp_path, undrawn, monkeypatch):
    put(tmp_path, "a", lines())
    command = ["report", str(tmp_path)]
    names = ("report.md", "report.html", f"{page.PICTURES}/front.png")
    files = [tmp_path / name for name in names]
    (tmp_path / page.PICTURES).mkdir()
    for mine in files:
        mine.write_text("mine")
        with pytest.raises(ValueError, match=re.escape(f"{mine}: is there and was not made by")):
            application()(command)
        assert mine.read_text() == "mine"
        assert [path for path in files if path.exists()] == [mine]
        mine.unlink()
    for mine in files:
        mine.write_text("mine")
    monkeypatch.undo()
    application()([*command, "--force"])
    made = [mine.read_bytes() for mine in files]
    assert b"mine" not in made
    put(tmp_path, "b", lines(label="CoCoD-SGD"))
    application()(command)
    again = [mine.read_bytes() for mine in files]
    assert all(one != other for one, other in zip(again, made, strict=True))
