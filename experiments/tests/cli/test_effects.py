"""What is given on the command line has an effect or is refused."""

import pytest

from distoptim import cli

ADAMW = ("--optimizer", "adamw")


def words(*args):
    """What a command says instead of beginning."""
    with pytest.raises(ValueError, match="has an effect only") as error:
        cli.application()(args)
    return str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("train", "--hide-communication", "--tau", "8"),
            "--tau 8: has an effect only without --hide",
        ),
        (
            ("train", "--algorithm", "ddp", "--tau", "8"),
            "--tau 8: has an effect only without --hide",
        ),
        (
            ("simulate", "--taus", "2,8", "--hide-communication"),
            "--taus 2,8: has an effect only without",
        ),
        (
            ("train", "--milestones", "3"),
            "--milestones 3.0: has an effect only with --schedule steps",
        ),
        (
            ("compare", "--decay", "0.5", "--schedule", "cosine"),
            "--decay 0.5: has an effect only with --schedule steps",
        ),
        (
            ("train", "--schedule", "steps"),
            "--schedule steps: has an effect only with --milestones",
        ),
        (
            ("train", *ADAMW, "--momentum", "0.5"),
            "--momentum 0.5: has an effect only with --optimizer sgd",
        ),
        (
            ("train", *ADAMW, "--nesterov"),
            "--nesterov: has an effect only with --optimizer sgd and a --momentum above 0",
        ),
        (("train", "--momentum", "0", "--nesterov"), "--nesterov: has an effect only with"),
        (
            ("train", "--epochs", "3", "--steps", "9"),
            "--epochs 3: has an effect only without --steps",
        ),
        (
            ("train", "--data", "digits", "--data-dir", "x"),
            "--data-dir x: has an effect only with data that have files",
        ),
        (
            ("partition", "--data-dir", "x"),
            "--data-dir x: has an effect only with data that have files",
        ),
        (
            ("train", "--algorithm", "bmuf", "--carry"),
            "--carry: has an effect only with a --delay above 0",
        ),
        (
            ("simulate", "--trace", __file__, "--step-ms", "4"),
            "--step-ms 4.0: has an effect only without --trace",
        ),
        (
            ("simulate", "--trace", __file__, "--slowdown", "pareto"),
            "--slowdown pareto: has an effect only without",
        ),
        (
            ("simulate", "--site-latency-ms", "3"),
            "--site-latency-ms 3.0: has an effect only with --site-size",
        ),
        (
            ("simulate", "--site-size", "3", "--workers", "2"),
            "--site-size 3: has an effect only with more --workers than that",
        ),
        (
            ("simulate", "--site-size", "2", "--collective", "tree"),
            "--collective tree: has an effect only without --site-size",
        ),
        (
            ("simulate", "--streams", "2", "--collective", "tree"),
            "--streams 2: has an effect only with --collective ring and without --site-size",
        ),
        (
            ("simulate", "--timing", "--methods", "ddp,foo"),
            "--methods ddp,foo: has an effect only without --timing",
        ),
        (
            ("simulate", "--timing", "--bandwidth-gbit-s", "2"),
            "--bandwidth-gbit-s 2.0: has an effect only without",
        ),
        (
            (
                "train",
                "--init",
                "tcp://localhost:1",
                "--rank",
                "0",
                "--world-size",
                "3",
                "--workers",
                "2",
            ),
            "--workers 2: has an effect only where this command starts them",
        ),
        (("simulate", "--period", "50"), "--period 50: has an effect only with --timing"),
        (("simulate", "--layers", "2"), "--layers 2: has an effect only with --timing"),
        (
            ("reproduce", "stragglers", "--real", "--processes", "2"),
            "--processes 2: has an effect only on virtual workers",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(args, message):
    assert words(*args).startswith(message)


@pytest.mark.parametrize(
    "args",
    [
        ("train",),
        ("train", *ADAMW, "--momentum", "0", "--no-nesterov"),
        ("train", "--algorithm", "bmuf", "--no-carry"),
        ("train", "--schedule", "steps", "--milestones", "3", "--decay", "0.5"),
        ("train", "--schedule", "cosine"),
        ("train", "--data", "mnist", "--data-dir", "x"),
        ("train", "--algorithm", "diloco", "--carry", "--delay", "1"),
        ("simulate", "--trace", __file__, "--slowdown", "none"),
        ("simulate", "--site-size", "2", "--site-latency-ms", "1"),
        (
            "simulate",
            "--timing",
            "--params",
            "1e6",
            "--step-ms",
            "4",
            "--latency-ms",
            "2",
            "--workers",
            "8",
        ),
    ],
)
def test_what_has_an_effect_or_switches_off_may_be_given(args):
    command, bound, _ = cli.application().parse_args(args)
    command.given(bound.arguments).check_effects()


def test_what_is_needed_is_asked_of_options_that_there_are():
    for name in ("train", "compare", "simulate", "partition"):
        command = cli.application()[name].default_command
        for option in command.options.values():
            for need in option.needs:
                need.holds(command.given({option.name: 2}).all)
