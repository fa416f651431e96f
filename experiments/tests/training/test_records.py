import json
from pathlib import Path

import pytest
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Machines

START = records.Start(
    label="one",
    config=RunConfig(lr=1.0),
    surroundings=records.surroundings(),
    steps=3,
    steps_per_epoch=3,
    parameters=1,
)
END = records.Summary(
    step=1,
    diverged=False,
    seconds=2.0,
    exposed_s=0.5,
    overhead_s=0.25,
    hidden_s=None,
    bytes=4,
    syncs=1,
)


def write(path, *lines, tail=""):
    path.write_text("".join(line.model_dump_json() + "\n" for line in lines) + tail)
    return path


def log(step):
    return records.Log(step=step, epoch=step, seconds=step, loss=1 / (step + 1))


def test_what_is_written_is_read(tmp_path):
    writer = records.RecordWriter(tmp_path / records.FILE)
    for line in (START, log(1), END):
        writer.write(line)
    writer.close()
    record = records.read(tmp_path)
    assert record.config == RunConfig(lr=1.0)
    assert record.logs == [log(1)]
    assert record.summary == END
    assert (END.computation_s, END.exposed_share, END.overhead_share) == (1.25, 0.4, 0.2)


def test_a_record_may_lie_beside_its_folder(tmp_path):
    folder = tmp_path / "run"
    assert not records.finished(folder)
    write(tmp_path / "run.record.jsonl", START, log(1), END)
    (tmp_path / "begun").mkdir()
    write(tmp_path / "begun" / records.FILE, START)
    assert records.finished(folder)
    assert records.read(folder).logs == [log(1)]
    assert records.folders(tmp_path) == [tmp_path / "begun", folder]
    # What is in the folder was made later: nothing is run that has a whole record.
    folder.mkdir()
    write(folder / records.FILE, START, log(2))
    assert records.read(folder).logs == [log(2)]
    assert records.folders(tmp_path) == [tmp_path / "begun", folder]


@pytest.mark.parametrize(
    "tail", ['{"kind": "lo', '{"kind": "log", "step": 2}', '{"kind": "log", "loss": "\\u00']
)
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, tail):
    record = records.read(write(tmp_path / "r.jsonl", START, log(1), tail=tail))
    assert record.logs == [log(1)]
    assert record.summary is None


@pytest.mark.parametrize(
    "bad",
    [
        "{]\n",
        "3\n",
        '{"step": 1}\n',
        "\n",
        '{"kind": "lag", "step": 1}\n',
        '{"kind": "log", "step": 1}\n',
        '{"kind": "log", "step": 1, "epoch": 1, "seconds": "long", "loss": 1}\n',
        '{"kind": "checkpoint", "step": 1, "path": "a", "size": 3}\n',
    ],
)
def test_a_damaged_line_is_named(tmp_path, bad):
    path = write(tmp_path / "r.jsonl", START, tail=bad + log(1).model_dump_json() + "\n")
    with pytest.raises(ValueError, match=r"r\.jsonl:2: not a"):
        records.read(path)


def test_a_record_must_begin_with_its_start(tmp_path):
    with pytest.raises(ValueError, match=r"r\.jsonl:1:.*start"):
        records.read(write(tmp_path / "r.jsonl", log(1)))
    with pytest.raises(ValueError, match=r"nowhere.*No such file"):
        records.read(tmp_path / "nowhere")


def test_resuming_drops_the_lines_of_steps_that_are_made_again(tmp_path):
    path = write(tmp_path / "r.jsonl", START, log(1), log(2), log(3), tail='{"ki')
    writer = records.RecordWriter(path, after_step=2)
    writer.write(log(3))
    writer.close()
    assert records.read(path).logs == [log(1), log(2), log(3)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / records.FILE
    # The draft takes the file's place, the link with it.
    path.with_suffix(".draft").symlink_to("/dev/full")
    writer = records.RecordWriter(path)
    with pytest.raises(ValueError, match=r"record\.jsonl: cannot be written: No space left"):
        writer.write(START)


def test_surroundings_name_versions_and_machine_but_no_host():
    made = records.surroundings().model_dump()
    assert {"date", "distoptim", "torch", "python", "commit", "machine"} == made.keys()
    assert made["machine"].keys() == {"processor", "cores", "system"}


def test_a_configuration_survives_its_record():
    config = RunConfig(
        algorithm="easgd", options={"alpha": 0.1}, latency_ms=2.0, milestones=(1.0, 2.0)
    )
    start = START.model_copy(update={"config": config, "machines": Machines(step_ms=10)})
    made = records.Start.model_validate_json(start.model_dump_json())
    assert made == start
    assert RunConfig(**made.config.to_dict()) == config


def test_what_was_run_elsewhere_can_be_read_here():
    """Names of models and ranges are for who runs it, and a trace may have gone since."""
    elsewhere = {"model": "one of their own", "tau": 0}
    config = RunConfig().to_dict() | elsewhere
    machines = Machines().to_dict() | {"trace": "gone.csv"}
    text = json.loads(START.model_dump_json()) | {"config": config, "machines": machines}
    made = records.Start.model_validate_json(json.dumps(text))
    assert (made.config.model, made.config.tau) == ("one of their own", 0)
    assert made.machines.trace == "gone.csv"
    config["tau"] = "two"
    with pytest.raises(ValueError, match=r"config\.tau"):
        records.Start.model_validate_json(json.dumps(text))


def test_a_loss_that_is_not_a_number_survives_its_record(tmp_path):
    path = write(tmp_path / "r.jsonl", START, log(1).model_copy(update={"loss": float("nan")}))
    assert records.read(path).logs[0].loss != records.read(path).logs[0].loss
