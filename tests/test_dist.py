"""``make dist``: archives have what they should; versions agree wherever they stand."""

import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import dist
import oldest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {found.lower().replace("_", "-"): version for found, version in pairs}


def requirements():
    """Every direct dependency with those of the extras, but for extras that are pinned or tools of this repository."""
    tools = ("test", "check", "docs", "dist")
    extras = [each for name, group in PROJECT["optional-dependencies"].items() if name not in tools for each in group]
    return [Requirement(each) for each in [*PROJECT["dependencies"], *extras]]


def test_changelog_and_citation_have_the_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert cited["version"] == dist.version()
    assert f"\n## [{dist.version()}] - {cited['date-released']}\n" in changes
    assert changes.index("## [Unreleased]") < changes.index(f"## [{dist.version()}]")


def test_the_oldest_versions_are_the_lower_bounds_and_the_pinned_ones_are_allowed():
    oldest, newest = pins("constraints-min.txt"), pins("constraints.txt")
    for each in requirements():
        name = each.name.lower().replace("_", "-")
        (bound,) = [part.version for part in each.specifier if part.operator in (">=", "==")]
        assert oldest[name] == bound, f"{each}: constraints-min.txt has {oldest[name]}"
        assert each.specifier.contains(newest[name]), f"{each}: constraints.txt has {newest[name]}"
    assert set(oldest) == {each.name.lower().replace("_", "-") for each in requirements()}


def test_an_environment_of_the_oldest_versions_takes_all_of_them_but_torch():
    given = oldest.constraints("# torch==1\ntorch==2.6\n\ntorchvision==1\nnumpy==2\n")
    assert given == "torchvision==1\nnumpy==2\n"
    assert all((ROOT / name).is_file() for name in oldest.TESTS)
    assert set(oldest.EXTRAS.split(",")) <= set(PROJECT["optional-dependencies"])


def test_faults_of_archives_are_named():
    head = f"peerlora-{dist.version()}"
    whole = {f"peerlora/{name}" for name in dist.NEEDED}
    whole |= {f"{head}.dist-info/{name}" for name in ("licenses/LICENSE", "entry_points.txt")}
    assert dist.wheel_faults(whole, set()) == []
    assert dist.wheel_faults(whole - {"peerlora/py.typed"}, set()) == ["peerlora/py.typed is missing"]
    assert dist.wheel_faults(whole | {"tests/test_x.py"}, set()) == ["tests/test_x.py does not belong there"]
    assert dist.wheel_faults(whole, {"peerlora/runs/page.html"}) == ["peerlora/runs/page.html is missing"]
    files = {f"{head}/{name}" for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")}
    assert dist.sdist_faults(files) == []
    assert dist.sdist_faults(files | {f"{head}/tests/test_x.py"}) == [f"{head}/tests/test_x.py does not belong there"]


def test_torch_is_lent_where_no_installer_writes(tmp_path):
    packages, lent = tmp_path / "packages", tmp_path / "lent"
    packages.mkdir()
    dist.lend_torch(lent, packages)
    assert [path.name for path in packages.iterdir()] == ["lent.pth"]
    assert (packages / "lent.pth").read_text().strip() == str(lent)
    assert (lent / "torch" / "__init__.py").is_file()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(find_spec("build") is None or find_spec("twine") is None, reason="needs the extra dist")
def test_the_wheel_runs_in_an_environment_of_its_own():
    done = subprocess.run([sys.executable, ROOT / "tools" / "dist.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "peerlora train peerlora.yaml" in done.stdout
