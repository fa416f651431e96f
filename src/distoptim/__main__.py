"""`python -m distoptim`."""

from distoptim.cli import main

if __name__ == "__main__":
    main()
