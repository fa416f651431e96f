"""The command `distoptim`."""

from __future__ import annotations

import sys


def main() -> None:
    """The console's entry point: runs the command line and exits with its code.

    Codes: 0 done, 1 a worker failed, 2 a wrong value, 128 + signal when interrupted (130 for Ctrl-C).
    """
    try:
        import click
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        print(f"Error: the command line needs {error.name}: pip install 'distoptim[train]'", file=sys.stderr)
        sys.exit(2)
    from distoptim.commands import cli

    try:
        code = cli.main(prog_name="distoptim", standalone_mode=False)
    except click.ClickException as error:
        print(f"Error: {error.format_message()}", file=sys.stderr)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
