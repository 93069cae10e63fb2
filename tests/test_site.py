"""The documentation site: pages as they are laid, and what is built of them."""

import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml

import peerlora
import site_pages

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NOT_IN_NAV = re.compile(r"(decisions/0.*|examples/(?!index).*|conduct)\.md")
"""Pages that others lead to."""


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    """The folder in which the pages are laid."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_pages, "PAGES", tmp_path_factory.mktemp("site") / "pages")
        site_pages.lay_pages()
        yield site_pages.PAGES


def test_every_page_is_in_the_nav_and_every_entry_is_a_page(laid):
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=site_pages._Tolerant)
    listed = [page for _, page in site_pages.nav_pages(config["nav"])]
    there = {path.relative_to(laid).as_posix() for path in laid.rglob("*.md")}
    assert len(listed) == len(set(listed)) and set(listed) <= there
    assert {page for page in there - set(listed) if not NOT_IN_NAV.fullmatch(page)} == set()


def test_links_of_laid_pages_lead_to_laid_files(laid):
    checked = 0
    for path in laid.rglob("*.md"):
        for _, target, _ in site_pages.LINK.findall(site_pages.FENCED.sub("", path.read_text(encoding="utf-8"))):
            file = target.partition("#")[0]
            if file and "://" not in file and not file.startswith("mailto:"):
                checked += 1
                assert (path.parent / file).resolve().is_file(), f"{path.name}: {target}"
    assert checked > 300


def test_the_api_page_has_every_public_name_once(laid):
    named = [name for names in site_pages.GROUPS.values() for name in names]
    assert sorted(named) == sorted(peerlora.__all__)
    page = (laid / "api.md").read_text(encoding="utf-8")
    for name in named:
        assert re.search(rf"^::: peerlora\.[\w.]+\.{name}$", page, re.MULTILINE), name


def test_llms_txt_leads_to_every_page_of_the_nav(laid):
    text = (laid / "llms.txt").read_text(encoding="utf-8")
    assert text.startswith("# peerlora\n\n> ")
    links = re.findall(r"^- \[[^\]]+\]\(([^)]+)\)", text, re.MULTILINE)
    assert len(links) > 40 and all((laid / link).is_file() for link in links)


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path):
    source = ROOT / "docs" / "page-that-is-not.md"
    with pytest.raises(FileNotFoundError, match="missing.md"):
        site_pages.moved("[a](missing.md)", source)
    kept = "```\n[a](missing.md)\n```\n[b](https://example.org) [c](#here)\n"
    assert site_pages.moved(kept, source) == kept
    assert site_pages.moved("[r](../README.md#limits)", source) == "[r](index.md#limits)"


class Page(HTMLParser):
    """Anchors, links and what a page loads."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found.get("id"), found.get("name")} - {None}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        names = ("src", "srcset", "poster", "data", *(["href"] if tag == "link" else []))
        self.loads += [found[name] for name in names if found.get(name)]


@pytest.fixture(scope="module")
def built():
    """The folder of the built site."""
    if find_spec("zensical") is None or find_spec("mkdocstrings_handlers") is None:
        pytest.skip("needs the extra docs")
    lay, build = ["tools/site_pages.py"], ["-m", "zensical", "build", "--strict", "--clean"]
    for words in (lay, build, [*lay, "--sources"]):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "site"


@pytest.mark.slow
def test_every_link_and_anchor_of_the_built_site_leads_somewhere(built):
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in built.rglob("*.html")}
    pages = {path: page for path, page in pages.items() if path.name != "404.html"}
    assert len(pages) > 60
    for path, page in pages.items():
        for link in map(urlparse, page.links):
            if link.scheme or link.netloc:
                continue
            there = (path.parent / unquote(link.path)).resolve() if link.path else path
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{path.name}: {link.geturl()}"
            if link.fragment and there in pages:
                assert unquote(link.fragment) in pages[there].anchors, f"{path.name}: {link.geturl()}"


@pytest.mark.slow
def test_the_built_site_has_what_it_needs(built):
    assert (built / "llms.txt").is_file() and (built / "quick-start.md").is_file()
    shown = re.sub(r"<[^>]+>", "", (built / "commands.html").read_text(encoding="utf-8"))  # without colours
    assert "peerlora train --resume runs/first" in shown
    api = (built / "api.html").read_text(encoding="utf-8")
    assert "Raises ConfigError" in api and 'id="peerlora.runtime.cluster.run.simulate"' in api
    for path in built.rglob("*.html"):
        for load in Page(path.read_text(encoding="utf-8")).loads:
            assert not urlparse(load).netloc, f"{path.name} loads {load}"
    for path in built.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path


class Quiet(SimpleHTTPRequestHandler):
    """Serves without a word."""

    def log_message(self, format, *args):
        pass


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or find_spec("playwright") is None, reason="needs chromium and playwright")
def test_a_browser_asks_nothing_of_foreign_hosts_and_pages_fit(built):
    from playwright.sync_api import sync_playwright

    def handler(*words):
        return Quiet(*words, directory=str(built))

    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base, asked, errors = f"http://127.0.0.1:{server.server_port}/", [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme, width in (("light", 1280), ("dark", 390)):
            page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            for name in ("index.html", "api.html", "commands.html", "methods.html", "tutorials/csv.html"):
                page.goto(base + name, wait_until="networkidle")
                assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (name, width)
        browser.close()
    server.shutdown()
    server.server_close()
    foreign = [url for url in asked if not url.startswith((base, "data:", "blob:"))]
    assert asked and foreign == [] and errors == []
