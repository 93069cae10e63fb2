"""Lay the pages of the documentation site into build/pages: ``python tools/site_pages.py``.

The pages of this repository are written for reading where they lie.  Here their links are turned to where the site has
them, and the pages are added that are made from code: the command line, the Python API, the examples and llms.txt.
"""

import ast
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import yaml

import peerlora
from command_pages import command_page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "pages"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2[ ]*$", re.DOTALL | re.MULTILINE)
NAMED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
NAMED |= {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md", "CODE_OF_CONDUCT.md": "conduct.md"}

GROUPS = {
    "Running": ("load_config", "RunConfig", "schema", "simulate", "resume", "Result", "read_events"),
    "Models of a run": ("export_from_run", "ModelChoice", "Adapters", "AdapterSpec"),
    "A training loop of your own": ("join",),
    "Graphs": ("Topology", "build_topology"),
    "Before a run": ("compose", "Federation"),
    "Methods and names of your own": (
        *("REGISTRY", "describe_algorithms", "register_method", "register_topology"),
        *("register_partition", "register_task"),
    ),
    "Errors": (
        *("PeerloraError", "ConfigError", "DataError", "ModelError", "TopologyError", "CompositionError"),
        *("RunError", "DivergenceError", "Stopped", "ExtraMissing", "ClusterError", "IdentityError"),
        *("TransportError", "QuorumMissed"),
    ),
}
"""Heading -> names of ``peerlora`` that are described below it; a test holds it against ``peerlora.__all__``."""
MODULES = ("peerlora.hf", "peerlora.flower")


def place(path: Path) -> Path:
    """Return where the site has a file or folder of this repository, relative to its root."""
    name = path.relative_to(ROOT).as_posix()
    if name in NAMED:
        return Path(NAMED[name])
    if path.is_dir():
        return Path(name.removeprefix("docs/")) / "index.md"
    if path.parent == ROOT / "examples" and path.suffix == ".py":
        return Path("examples") / f"{path.stem}.md"
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs")
    return Path("files") / (name if path.suffix else f"{name}.txt")  # Dockerfile, LICENSE and the like


def outside_fences(text: str, change: re.Pattern, by) -> str:
    """Substitute in a page, but not within its code blocks."""
    parts, end = [], 0
    for block in FENCED.finditer(text):
        parts += [change.sub(by, text[end : block.start()]), block.group()]
        end = block.end()
    return "".join([*parts, change.sub(by, text[end:])])


def moved(text: str, source: Path) -> str:
    """Return a page with its relative links as the site has them; copy files that are no pages.

    A link that leads nowhere raises FileNotFoundError.
    """
    here = place(source)

    def turn(found: re.Match) -> str:
        target, _, fragment = found.group(2).partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return found.group()
        other = (source.parent / unquote(target)).resolve(strict=True)
        there = place(other)
        if other.is_file() and there.suffix != ".md":
            (PAGES / there).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(other, PAGES / there)
        relative = os.path.relpath(there, here.parent)
        return f"{found.group(1)}{relative}{'#' + fragment if fragment else ''}{found.group(3)}"

    return outside_fences(text, LINK, turn)


def write(name: Path | str, text: str) -> None:
    """Write one page."""
    path = PAGES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def title(text: str) -> str:
    """Return a page's first heading."""
    return re.search(r"^# +(.+)$", text, re.MULTILINE)[1]


def lay_written_pages() -> None:
    """Lay the pages of the repository."""
    for path in [*(ROOT / name for name in NAMED), *(ROOT / "docs").rglob("*.md")]:
        write(place(path), moved(path.read_text(encoding="utf-8"), path))
    decisions = sorted((PAGES / "decisions").glob("0*.md"))
    rows = [f"- [{title(path.read_text(encoding='utf-8'))}]({path.name})" for path in decisions]
    write("decisions/index.md", "# Decisions\n\nWhy it is built so.\n\n" + "\n".join(rows) + "\n")


def lay_examples() -> None:
    """Lay a page for every script of examples/, which shows it."""
    rows = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        said = (ast.get_docstring(ast.parse(code)) or "").split("\n\n")[0].replace("\n", " ")
        rows.append(f"- [{path.name}]({path.stem}.md): {said}")
        write(place(path), f"# {path.name}\n\n{said}\n\n```python\n{code}```\n")
    head = "# Examples\n\nShort scripts, each run by the tests.\n\n"
    write("examples/index.md", head + "\n".join(rows) + "\n")


def api_page() -> str:
    """Return the page of the Python API: headings, and for each name what mkdocstrings reads from its docstring."""
    lines = ["# Python API", "", "What `import peerlora` gives; [Python](python.md) shows how it goes together."]
    homes = peerlora._HOMES  # where a name is defined
    for heading, names in GROUPS.items():
        lines += ["", f"## {heading}"]
        for name in names:
            lines += ["", f"::: peerlora.{homes[name]}.{name}"]
            if name == "RunConfig":  # its fields are the page of settings
                lines += ["    options:", "      members: false"]
    lines += ["", "## For other trainers"]
    for module in MODULES:
        lines += ["", f"::: {module}", "    options:", "      show_root_full_path: true"]
    return "\n".join(lines) + "\n"


def nav_pages(nav: list) -> list[tuple[str, str]]:
    """Return (title, page) of a nav in its order."""
    found = []
    for entry in nav:
        for name, below in entry.items() if isinstance(entry, dict) else [("", entry)]:
            found += [(name, below)] if isinstance(below, str) else nav_pages(below)
    return found


def headings(text: str) -> str:
    """Return a page's headings of the second level, on one line."""
    found = re.findall(r"^## +(.+)$", FENCED.sub("", text), re.MULTILINE)
    return "; ".join(re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", each) for each in found)


def llms_text() -> str:
    """Return llms.txt: what peerlora is, and every page with its headings."""
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Tolerant)
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", "", "## Pages", ""]
    for name, page in nav_pages(config["nav"]):
        text = (PAGES / page).read_text(encoding="utf-8")
        below = headings(text)
        lines.append(f"- [{name or title(text)}]({page}){': ' + below if below else ''}")
    return "\n".join(lines) + "\n"


class _Tolerant(yaml.SafeLoader):
    """Reads mkdocs.yml, whose slugify names a function: the name is left out."""


_Tolerant.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def lay_pages() -> None:
    """Lay all pages anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    lay_written_pages()
    lay_examples()
    write("commands.md", command_page())
    write("api.md", api_page())
    write("assets/site.css", (ROOT / "tools" / "site.css").read_text(encoding="utf-8"))
    write("llms.txt", llms_text())


def copy_sources(site: Path) -> None:
    """Put the text of every page beside its HTML, where llms.txt leads."""
    for path in PAGES.rglob("*.md"):
        shutil.copyfile(path, site / path.relative_to(PAGES))


if __name__ == "__main__":
    copy_sources(ROOT / "site") if sys.argv[1:] == ["--sources"] else lay_pages()
