"""All benchmarks, one after the other."""

from __future__ import annotations

from benchmarks import codecs, cost, hidden, predicted, scale
from benchmarks.report import json_path, save

if __name__ == "__main__":
    target = json_path(__doc__)
    save([cost.main(), hidden.main(), predicted.main(), scale.main(), codecs.main()], target)
