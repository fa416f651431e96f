"""`python -m distoptim`, and the console's `distoptim`."""

import sys

_EXTRA = ("cyclopts", "rich")


def main() -> None:
    """Run the command line and exit with its code, or say in one line what it needs."""
    try:
        from distoptim.cli import run
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(
            f"Error: the command line needs {error.name}: pip install 'distoptim[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
