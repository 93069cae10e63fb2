"""Put what a harness measured between two marker lines of a Markdown file, so that no number is typed by hand."""

from pathlib import Path


def insert(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no lines {start} and {end}; add them where the results belong")
    whole = path.with_name(f".{path.name}.new")  # a write that is cut off must not empty the page
    whole.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}", encoding="utf-8")
    whole.replace(path)
