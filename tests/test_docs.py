"""The pages: every link leads somewhere, every config is valid, and settings are as the code has them."""

import re
import tomllib
from pathlib import Path
from typing import get_args
from urllib.parse import unquote

import pytest
import yaml
from pydantic import BaseModel

from peerlora import RunConfig, load_config
from peerlora.algorithms import REGISTRY, method_class
from peerlora.config.exchange import AdversaryConfig, CodecConfig, RelayConfig, RobustConfig
from peerlora.config.reference import page
from peerlora.config.sections import Absence, ClockConfig, PartitionConfig, SelectConfig, TopologyConfig
from peerlora.environment import EXTRAS
from peerlora.experiments.grid import load_grid
from peerlora.experiments.inference import detectable_table

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
UNIONS = (PartitionConfig, TopologyConfig, CodecConfig, RobustConfig)


def kinds(union):
    """The models of a union that a ``kind`` tells apart."""
    return get_args(get_args(union)[0])


def sections():
    """Every model that a config is made of."""
    plain = [field.annotation for field in RunConfig.model_fields.values()]
    found = [each for each in plain if isinstance(each, type) and issubclass(each, BaseModel)]
    return [
        RunConfig,
        *found,
        AdversaryConfig,
        RelayConfig,
        SelectConfig,
        ClockConfig,
        Absence,
        *(kind for union in UNIONS for kind in kinds(union)),
    ]


@pytest.mark.parametrize("model", sections(), ids=lambda model: model.__name__)
def test_every_setting_says_in_one_line_what_it_means(model):
    assert model.__doc__
    for name, field in model.model_fields.items():
        section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        if section or (name == "kind" and field.is_required()):
            continue  # described by the docstring of its class
        assert field.description and "\n" not in field.description and field.description[-1] == ".", name


def test_the_page_lists_every_method_that_takes_codecs_and_robust_rules():
    text = (ROOT / "docs" / "methods" / "compressed-and-robust.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"once a round and nothing else:\n(.*?)\. With any other", text, re.DOTALL)
    traits = {name: method_class(name).traits for name in REGISTRY}
    taking = {name for name, each in traits.items() if not (each.refusal("codec") or each.refusal("robust"))}
    assert set(re.findall(r"`(.*?)`", listed)) == taking


def test_nobody_is_told_to_install_a_name_that_no_index_has():
    """Extras are installed from the repository; a stranger may have taken the name elsewhere."""
    files = [*PAGES, *(ROOT / "src").rglob("*.py"), *(ROOT / "examples").rglob("*.py"), ROOT / "Makefile"]
    told = re.compile(r"install[^\n]*\bpeerlora\s*\[")
    assert [str(path) for path in files if told.search(path.read_text(encoding="utf-8"))] == []


def test_every_optional_part_is_in_the_readme():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| extra |")[1].split("## ")[0]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(.+?)`", row)}
    assert listed == set(extras)
    assert {name for name in EXTRAS if name not in extras} == set()


def test_the_page_of_settings_is_up_to_date():
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == page(), "run `make docs`"


@pytest.mark.parametrize("tests", [1, 8])
def test_the_detectable_differences_on_the_page_are_those_of_the_code(tests):
    text = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
    shown = text.split(f"<!-- detectable-{tests} -->\n")[1].split(f"<!-- /detectable-{tests} -->")[0]
    expected = detectable_table((3, 5, 10, 20, 50), (0.01, 0.02, 0.03, 0.05), tests)
    assert shown == expected, f"put detectable_table's text there:\n{expected}"


@pytest.mark.parametrize(("name", "union"), [("data", PartitionConfig), ("topologies", TopologyConfig)])
def test_every_kind_of_partition_and_topology_is_on_its_page(name, union):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for kind in kinds(union):
        for field in ("kind", "weights"):
            words = get_args(kind.model_fields[field].annotation) if field in kind.model_fields else ()
            assert all(f"`{word}`" in text for word in words), f"{kind.__name__}.{field} is missing"


def test_the_configs_in_the_docs_are_valid():
    blocks = []
    for path in PAGES:
        blocks += re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        tree = yaml.safe_load(block)
        load_grid(tree) if "axes" in tree else load_config(tree)


def anchors(path):
    """The fragments that a page's headings have on GitHub."""
    found, seen = set(), {}
    text = re.sub(r"^(```|~~~).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
        seen[slug] = seen.get(slug, 0) + 1
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_and_anchor_leads_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, fragment = target.partition("#")
        other = (path.parent / unquote(file)).resolve() if file else path
        assert other.exists(), f"{target}: no such file"
        assert not fragment or fragment in anchors(other), f"{target}: no such heading"


def test_source_files_that_pages_and_comments_name_exist():
    """Paths of pages, scripts and modules from the root on, in pages and in code."""
    code = [*(ROOT / "src").rglob("*.py"), *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    past = {ROOT / "CHANGELOG.md", ROOT / "docs" / "log.md"}  # they say what was
    named = r"(?<![\w./-])((?:docs|bench|src/peerlora|examples)/[a-z\d_/.-]+\.(?:md|py))\b"
    for path in [*PAGES, *code]:
        for name in re.findall(named, path.read_text(encoding="utf-8")):
            assert path in past or (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


def test_every_harness_finds_the_markers_that_it_writes_between():
    import studies

    places = [(studies.PAGES / study.page, f"study-{name}") for name, study in studies.STUDIES.items()]
    places += [(studies.PAGES / "studies.md", "study-list")]
    for path in (ROOT / "bench").glob("*.py"):
        places += re.findall(r'insert\(Path\("([^"]+)"\), "([\w-]+)"', path.read_text(encoding="utf-8"))
    assert len(places) >= 20
    for path, name in places:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        assert lines.count(f"<!-- {name} -->") == lines.count(f"<!-- /{name} -->") == 1, f"{name} in {path}"
