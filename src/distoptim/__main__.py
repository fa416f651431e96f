"""`python -m distoptim`, and the console's `distoptim`."""

import sys

_EXTRA = ("cyclopts", "rich")


def main() -> None:
    """Run the command line and exit with its code, or say in one line what it needs."""
    try:
        from distoptim import cli
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        needs = f"the command line needs {error.name}: pip install 'distoptim[cli]'"
        print(f"Error: {needs}", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
