"""All benchmarks, one after the other."""

from __future__ import annotations

from benchmarks import codecs, cost, hidden, scale, simulated
from benchmarks.report import json_path, save

if __name__ == "__main__":
    target = json_path(__doc__)
    save([cost.main(), hidden.main(), simulated.main(), scale.main(), codecs.main()], target)
