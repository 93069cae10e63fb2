"""Dockerfile and compose.yaml: linted, checked, and the commands in them run as processes on the loopback."""

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from peerlora.runtime.launch.processes import free_ports
from waiting import until

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
MODEL_PACKAGE = COMPOSE["x-image"]["build"]["args"]["MODEL_PACKAGE"]
SITES = ("hospital-a", "hospital-b", "hospital-c")
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent)


def stages():
    """Name of a stage -> its instructions, continued lines as one."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    parts = re.split(r"^FROM (\S+) AS (\w+)\n", text, flags=re.MULTILINE)
    return {name: (base, body) for base, name, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint, which `make install` brings")
def test_the_linter_finds_nothing():
    done = subprocess.run([HADOLINT, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_images_have_no_root_no_compiler_and_a_check_of_health():
    found = stages()
    assert all(base == "python:${PYTHON}" or base in found for base, _ in found.values())
    assert re.search(r"^ARG PYTHON=3\.11-slim-\w+$", DOCKERFILE, re.MULTILINE) and ":latest" not in DOCKERFILE
    assert "USER 10001:10001" in found["base"][1]
    for name in ("worker", "peer"):
        base, body = found[name]
        assert base == "base" and "USER" not in body and "HEALTHCHECK" in body and "ENTRYPOINT" in body
    for name in ("base", "worker", "peer"):
        assert not re.search(r"pip|apt-get|gcc", found[name][1]), f"{name} installs something"
    assert list(found)[-1] == "peer", "the last stage is what is built by default"


def test_what_the_build_copies_reaches_it():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists() and any(fnmatch(name, each) for each in allowed), name


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"VARIANT": "cpu"}, "VARIANT=cpu needs TORCH_INDEX"),
        ({"VARIANT": "rocm"}, "VARIANT=rocm given; expected cpu or cuda"),
        ({"VARIANT": "cpu", "TORCH_INDEX": "x"}, ""),
        ({"VARIANT": "cuda"}, ""),
    ],
)
def test_a_build_argument_that_does_not_fit_is_one_message(given, told):
    check = re.search(r"case .* esac", stages()["installed"][1])[0]
    done = subprocess.run(["bash", "-c", check], env={"TORCH_INDEX": "", **given}, capture_output=True, text=True)
    assert (told in done.stderr and done.returncode == 2) if told else (done.returncode == 0 and not done.stderr)


def test_sites_reach_each_other_only_and_may_write_little():
    assert COMPOSE["networks"] == {"between-sites": {"internal": True}}
    assert set(COMPOSE["services"]) == {"office", *SITES}
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "ports" not in service
        assert "privileged" not in service and service["security_opt"] == ["no-new-privileges:true"]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).is_dir(), volume
        assert service.get("networks", []) == ([] if name == "office" else ["between-sites"])
    assert COMPOSE["services"]["office"]["network_mode"] == "none"
    assert set(COMPOSE["services"]["office"]["build"]["args"]) <= set(
        re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)
    )


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="needs docker compose",
)
def test_docker_compose_accepts_the_file():
    done = subprocess.run(["docker", "compose", "config", "--quiet"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


STAND_IN = """\
#!{python}
import sys
addresses = {addresses!r}
sys.argv[1:] = [addresses.get(word, word) for word in sys.argv[1:]]
from peerlora.cli import main
main()
"""


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """The folder /site of the containers, and a `peerlora` that takes the loopback for their network."""
    ports = free_ports(3)
    addresses = {f"{site}:7443": f"127.0.0.1:{port}" for site, port in zip(SITES, ports, strict=True)}
    command = tmp_path / "bin" / "peerlora"
    command.parent.mkdir()
    command.write_text(STAND_IN.format(python=sys.executable, addresses=addresses))
    command.chmod(0o755)
    shutil.copytree(ROOT / "containers", tmp_path / "given")
    (tmp_path / "keys").mkdir()
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"), prepend=":")
    return tmp_path


def words(name, folder):
    """What a service of compose.yaml starts, in a folder that stands for /site."""
    service = COMPOSE["services"][name]
    return [
        word.replace("/site/", f"{folder}/") for word in [*service.get("entrypoint", ["peerlora"]), *service["command"]]
    ]


@pytest.fixture
def start():
    """Start a process that does not outlive the test."""
    started = []

    def go(command):
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield go
    for each in started:
        if each.poll() is None:
            each.kill()
            each.communicate()


@pytest.mark.slow
@pytest.mark.alone
def test_three_sites_train_with_the_commands_of_the_file(trial, start, cache):
    office = subprocess.run(words("office", trial), capture_output=True, text=True)
    assert office.returncode == 0, office.stderr
    made = {path: path.read_bytes() for path in (trial / "keys").rglob("*.*")}
    assert subprocess.run(words("office", trial)).returncode == 0
    assert made == {path: path.read_bytes() for path in (trial / "keys").rglob("*.*")}, "a second start changes nothing"
    short = ["adapter.rank=2", "adapter.alpha=4", "threads=1", "train.rounds=2", "train.local_steps=1"]
    started = {}
    for site, port in zip(SITES, free_ports(3), strict=True):
        command = [word.replace("127.0.0.1:9464", f"127.0.0.1:{port}") for word in words(site, trial)]
        started[site] = start([*command, *short])
    for site, each in started.items():
        _, said = each.communicate()
        assert each.returncode == 0, said
        assert list((trial / "runs" / site / "adapters").glob("client-0?/adapter_model.safetensors"))


@pytest.fixture
def tool():
    """A container tool whose engine answers."""
    for name in ("docker", "podman"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True).returncode == 0:
            return name
    pytest.skip("needs docker or podman with an engine that answers (`docker info`)")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_is_built_and_runs_without_root_and_is_healthy(tool, tmp_path):
    """With TORCH_INDEX in the environment torch for CPUs, as compose.yaml; else torch as PyPI has it."""
    image, keys, site = (f"peerlora-test-{os.getpid()}{end}" for end in ("", "-keys", "-site"))

    def do(*words, fails=False):
        done = subprocess.run([tool, *map(str, words)], capture_output=True, text=True)
        assert fails or done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
        return done

    index = os.environ.get("TORCH_INDEX", "")
    arguments = [f"VARIANT={'cpu' if index else 'cuda'}", f"TORCH_INDEX={index}", "MODEL_PACKAGE=" + MODEL_PACKAGE]
    volumes = ["-v", f"{keys}:/site/keys", "-v", f"{ROOT / 'containers'}:/site/given:ro"]
    try:
        do("build", *(word for each in arguments for word in ("--build-arg", each)), "-t", image, ROOT)
        alone = ["run", "--rm", "--network", "none"]
        assert "dec-lora" in json.loads(do(*alone, image, "methods", "--json").stdout)
        assert do(*alone, "--entrypoint", "id", image, "-u").stdout.strip() == "10001"
        entry, *script = COMPOSE["services"]["office"]["entrypoint"]
        do(*alone, *volumes, "--entrypoint", entry, image, *script, *COMPOSE["services"]["office"]["command"])
        command = COMPOSE["services"][SITES[0]]["command"]
        do("run", "--detach", "--name", site, "--network", "none", *volumes, image, *command, "peer.join=600")

        def running():
            return do("inspect", "--format", "{{.State.Running}}", site).stdout.strip() == "true"

        check = json.loads(re.search(r"CMD (\[.+\])", stages()["peer"][1])[1])
        until(lambda: do("exec", site, *check, fails=True).returncode == 0, running, every=1)
    finally:
        for words in (("rm", "--force", site), ("volume", "rm", "--force", keys), ("rmi", "--force", image)):
            do(*words, fails=True)


def test_every_site_of_the_trial_has_rows_of_its_own():
    rows = [set((ROOT / "containers" / f"{site}.csv").read_text().splitlines()[1:]) for site in SITES]
    assert all(len(each) == 32 for each in rows) and not rows[0] & rows[1] and not rows[1] & rows[2]
    assert {line.rpartition(",")[2] for each in rows for line in each} == {"negative", "positive"}
