"""Code blocks of the pages, with what a comment before a block says of it.

A block has a language.  ``python`` and ``bash`` are run in the order of their page, ``yaml`` is checked and is the
config of what follows, ``toml`` is parsed; ``text`` and ``ini`` are no code.  Before a block may stand

    <!-- not run: REASON -->
    <!-- for each: NAME NAME ... -->             it is run once under each name, in place of the first
    <!-- for each, together: NAME NAME ... -->   likewise, as processes at the same time
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "bash", "yaml", "toml", "text", "ini"}
_BLOCK = re.compile(r"(?:<!-- ([^>]*?) -->\n\n)?^( *)```([^\n]*)\n(.*?)^\2```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One block of a page."""

    page: str
    number: int
    language: str
    text: str
    note: str

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return self.note.removeprefix("not run: ") if self.note.startswith("not run: ") else None

    @property
    def names(self) -> list[str]:
        """Under which names it is run, the one that it shows first."""
        return self.note.partition(": ")[2].split() if self.note.startswith("for each") else []

    @property
    def together(self) -> bool:
        """Whether its commands run at the same time."""
        return self.note.startswith("for each, together")


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in order."""
    name, text = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")
    return [
        Block(name, number, found[3].strip(), re.sub(f"^{found[2]}", "", found[4], flags=re.MULTILINE), _note(found[1]))
        for number, found in enumerate(_BLOCK.finditer(text))
    ]


def _note(comment: str | None) -> str:
    known = comment is not None and comment.startswith(("not run", "for each"))
    return comment if known and comment is not None else ""
