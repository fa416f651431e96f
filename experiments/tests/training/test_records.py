import json
import os

import pytest
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig

START = {"kind": "start", "step": 0, "config": {"lr": 1.0}}


def write(path, *lines, tail=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def log(step):
    return {"kind": "log", "step": step, "loss": 1 / (step + 1)}


def test_what_is_written_is_read(tmp_path):
    writer = records.RecordWriter(tmp_path / records.FILE)
    for line in (START, log(1), {"kind": "summary", "step": 1, "seconds": 2.0}):
        writer.write(line)
    writer.close()
    record = records.read(tmp_path)
    assert record.config == {"lr": 1.0}
    assert record.logs == [log(1)]
    assert record.summary == {"kind": "summary", "step": 1, "seconds": 2.0}


def test_a_record_may_lie_beside_its_folder(tmp_path):
    folder, end = tmp_path / "run", {"kind": "summary", "step": 1}
    assert not records.finished(folder)
    write(tmp_path / "run.record.jsonl", START, log(1), end)
    (tmp_path / "begun").mkdir()
    write(tmp_path / "begun" / records.DRAFT, START)
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


@pytest.mark.parametrize("bad", ["{]\n", "3\n", '{"step": 1}\n', "\n"])
def test_a_damaged_line_is_named(tmp_path, bad):
    path = write(tmp_path / "r.jsonl", START, tail=bad + json.dumps(log(1)) + "\n")
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_names_the_file(tmp_path):
    writer = records.RecordWriter(tmp_path / records.FILE)
    writer._file = open("/dev/full", "a")  # noqa: SIM115  # the writer closes it
    with pytest.raises(ValueError, match=r"record\.jsonl: cannot be written: No space left"):
        writer.write(START)


def test_surroundings_name_versions_and_machine_but_no_host():
    line = records.surroundings()
    assert {"date", "distoptim", "torch", "python", "commit", "machine"} == line.keys()
    assert line["machine"].keys() == {"processor", "cores", "system"}
    json.dumps(line)


def test_a_configuration_survives_its_record():
    config = RunConfig(algorithm="easgd", options={"alpha": 0.1}, latency_ms=2.0)
    assert RunConfig(**json.loads(json.dumps(config.to_dict()))) == config
