"""Write a finished demo's table into README.md and its report's first screen into docs/demo.png.

make demo ARGS="--out runs/demo"
python bench/demo_table.py runs/demo            # --picture needs Chromium
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from markers import insert
from peerlora import compose, load_config
from peerlora.experiments.demo import ROWS, Row, average_once, describe_findings


def read_rows(folder: Path) -> list[Row]:
    rows = []
    for name in ROWS:
        place = folder / name.lower().replace(" ", "-")
        rows.append(Row(name, "", json.loads((place / "summary.json").read_text())))
        if name == "alone":
            start = compose(load_config(place / "config.yaml")).start
            rows.append(Row("averaged once", "", average_once(rows[-1].summary, start)))
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| | mean client | worst client | averaged model | consensus of B·A | sent | seconds |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        reached, summary = row.summary["scores"], row.summary
        numbers = [f"{reached[name]:.3f}" for name in ("own_mean", "own_min", "averaged")]
        numbers += [f"{summary['consensus']['product']:.3g}", f"{summary['bytes_sent'] / 1e6:.0f} MB"]
        lines.append(f"| {row.name} | {' | '.join(numbers)} | {summary['seconds']['total']:.0f} |")
    return "\n".join([*lines, "", *describe_findings(rows)])


def picture(report: Path, to: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1700"]
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", *flags, f"--user-data-dir={profile}", f"--screenshot={to.resolve()}"]
        subprocess.run([*command, report.resolve().as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--picture", action="store_true")
    options = parser.parse_args()
    insert(Path("README.md"), "demo", table(read_rows(options.demo)))
    if options.picture:
        picture(options.demo / "report.html", Path("docs/demo.png"))
