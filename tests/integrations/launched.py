"""`launched.py NAME FOLDER`, started by a launcher: the cases of test_NAME.py for two workers."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

if __name__ == "__main__":
    importlib.import_module(f"tests.integrations.test_{sys.argv[1]}").two(Path(sys.argv[2]))
