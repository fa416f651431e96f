"""The console's entry point."""

from __future__ import annotations

import sys

_EXTRA = ("click", "matplotlib", "rich")


def main() -> None:
    """Run the command line and exit with its code.

    Codes: 0 done, 1 a worker failed, 2 a wrong value or file, 128 + signal when stopped by one (130
        for Ctrl-C).
    """
    try:
        import click
        from distoptim_experiments.cli import cli
        from distoptim_experiments.training.launch import WorkerError

        from distoptim.comm import CommunicationError
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRA:
            raise
        _fail(f"the command line needs {error.name}: pip install 'distoptim[train]'", 2)
    try:
        code = cli.main(prog_name="distoptim", standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except ValueError as error:
        _fail(str(error), 2)
    except (WorkerError, CommunicationError) as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(str(error) if error.filename is None else f"{error.filename}: {error.strerror}", 2)
    except (click.Abort, KeyboardInterrupt):
        code = 130
    sys.exit(code or 0)


def _fail(message: str, code: int) -> None:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
