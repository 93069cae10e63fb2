"""Choose the demo's learning rates: the same grid for every row, scored on training rows that are set aside.

python bench/demo_rates.py --out bench/results/demo_rates.json
"""

import argparse
import json
import tempfile
from pathlib import Path

from peerlora import simulate
from peerlora.experiments.demo import ROWS, configure_row, demo_config

RATES = (2e-3, 5e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/demo_rates.json"))
    options = parser.parse_args()
    found: dict = {}
    for name in ROWS:
        for rate in RATES:
            words = ["data.eval=null", "data.holdout=0.1", "eval.every=1000", f"train.lr={rate}"]
            config = configure_row(demo_config(words), name, words)
            with tempfile.TemporaryDirectory() as folder:
                reached = simulate(config, Path(folder) / "run").summary["scores"]
            found.setdefault(name, {})[str(rate)] = reached
            print(name, rate, reached, flush=True)
    best = {name: max(rates, key=lambda rate: rates[rate]["own_mean"]) for name, rates in found.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"accuracy": found, "best": best}, indent=1) + "\n")
    print(best)


if __name__ == "__main__":
    main()
