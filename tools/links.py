"""Check the links of the pages that lead elsewhere, where there is a network: ``python tools/links.py``.

Links between the pages are checked by the tests (tests/test_site.py).
"""

import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from site_pages import FENCED

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((https?://[^)\s]+)\)|<(https?://[^>\s]+)>")
SECONDS = 20
AT_ONCE = 8
GONE = (404, 410)
"""Answers that say that a page is not there; others, such as 403 and 429, often turn away programs only."""


def external_links(pages: Iterable[Path]) -> dict[str, list[str]]:
    """Address -> the pages that lead to it, outside of blocks of code, by their paths."""
    found: dict[str, list[str]] = {}
    for page in pages:
        for one, other in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
            found.setdefault((one or other).partition("#")[0], []).append(str(page))
    return found


def ask(address: str) -> int | None:
    """The status that an address answers with; None where no answer comes."""
    try:
        with urlopen(Request(address, headers={"User-Agent": "Mozilla/5.0 (links of pages)"}), timeout=SECONDS) as page:
            return page.status
    except HTTPError as error:
        return error.code
    except (OSError, HTTPException):
        return None


def judge(answers: dict[str, int | None], pages: dict[str, list[str]]) -> tuple[int, str]:
    """The exit code, and what is to be said of these answers."""
    if answers and all(status is None for status in answers.values()):
        return 0, f"no network: none of {len(answers)} links was checked"
    hosts = {urlparse(address).netloc for address, status in answers.items() if status is not None}
    faults = [
        f"{address}: {'no answer' if status is None else status}; in {', '.join(sorted(set(pages[address])))}"
        for address, status in sorted(answers.items())
        if status in GONE or (status is None and urlparse(address).netloc not in hosts)
    ]
    return int(bool(faults)), "\n".join([*faults, f"{len(answers)} links, {len(faults)} of them lead nowhere"])


def main() -> None:
    """Check all links of the pages that git has."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True)
    pages = external_links(ROOT / name for name in listed.stdout.splitlines())
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = dict(zip(pages, pool.map(ask, pages), strict=True))
    code, told = judge(answers, pages)
    print(told)
    sys.exit(code)


if __name__ == "__main__":
    main()
