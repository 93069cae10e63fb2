"""Images on the command line: a config, a run, its models, their answers, and what is refused."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from peerlora.config.loading import load_config
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.export import exporter_of, read_adapters

NAMES = ["left", "middle", "right"]
TASK = ("task.kind=image-classification", "data.label=label", "train.rounds=2", "train.dtype=fp32", "train.lr=0.1")


@pytest.fixture
def finished(cli, yaml_file, pictures, tmp_path):
    """A function that runs a federation on images and gives its folder."""

    def run(*words, kind="vit", name="run", train=None):
        data = f"data.train={train or pictures}"
        answer = cli("train", yaml_file(*TASK, data, *words, kind=kind), "--out", tmp_path / name)
        assert answer.code == 0, answer.err
        return tmp_path / name

    return run


def answers(cli, *words):
    answer = cli("predict", *words)
    assert answer.code == 0, answer.err
    return [json.loads(line) for line in answer.out.splitlines()]


def shares(found):
    return np.array([[each["probabilities"][name] for name in NAMES] for each in found])


def shares_of(run, client, rows):
    """[row, class] what a client of a run says of all images of a source."""
    config = load_config(run / "config.yaml", [f"data.eval={rows}"])
    federation, x = compose(config), read_adapters(run, exporter_of(run))
    own = x.mean() if client is None else x.rows([client])
    return torch.softmax(
        torch.from_numpy(federation.learner.logits(own, federation.eval_data, 7)[0]).double(), 1
    ).numpy()


def by_pipeline(folder, files):
    from transformers import pipeline

    classify = pipeline("image-classification", model=str(folder), top_k=3)
    found = [{each["label"]: each["score"] for each in told} for told in classify([str(file) for file in files])]
    return np.array([[own[name] for name in NAMES] for own in found])


@pytest.mark.filterwarnings("ignore:.*requires torchvision")
@pytest.mark.parametrize(
    ("kind", "words"),
    [("vit", ()), ("deit", ("adapter.init=pissa",)), ("vit", ("adapter.modules_to_save=[fc1]",))],
)
def test_models_answer_as_the_run_and_as_the_pipeline_do(cli, finished, picture_folder, tmp_path, kind, words):
    run, rows = finished(*words, kind=kind), f"folder:{picture_folder}"
    assert cli("merge", run, "--client", "2", "--to", tmp_path / "model").code == 0
    assert cli("export", run, "--client", "2", "--to", tmp_path / "adapter", "--with-base").code == 0
    files, expected = sorted(picture_folder.glob("*/*.png")), shares_of(run, 2, rows)
    for folder in (tmp_path / "model", tmp_path / "adapter", run / "adapters" / "client-02"):
        found = answers(cli, folder, "--rows", rows, "--batch", "7")
        assert [each["image"] for each in found] == list(map(str, files))
        assert [each["row"] for each in found] == list(range(1, 49))
        assert np.abs(shares(found) - expected).max() < 1e-5
        assert [each["label"] for each in found] == [NAMES[i] for i in expected.argmax(1)]
    for folder in (tmp_path / "model", tmp_path / "adapter"):
        assert np.abs(by_pipeline(folder, files) - expected).max() < 1e-5
    assert expected.std(0).max() > 0.01, "all images have the same answer"


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_an_adapter_folder_is_loaded_by_peft_with_its_image_processor(cli, finished, picture_folder, tmp_path, kind):
    from peft import AutoPeftModel
    from PIL import Image
    from transformers import AutoImageProcessor

    run = finished(kind=kind)
    assert cli("export", run, "--average", "--to", tmp_path / "adapter", "--with-base").code == 0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] is None and settings["modules_to_save"] == ["classifier"]
    model = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert model.config.id2label == dict(enumerate(NAMES))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "adapter", backend="pil")
    files = sorted(picture_folder.glob("*/*.png"))
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")
    with torch.no_grad():
        found = torch.softmax(model(**pixels).logits.double(), 1).numpy()
    assert np.abs(found - shares_of(run, None, f"folder:{picture_folder}")).max() < 1e-5


def test_folders_say_what_they_hold_and_may_be_uploaded(cli, finished, tmp_path):
    run = finished()
    assert cli("merge", run, "--average", "--to", tmp_path / "model").code == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert '"pipeline_tag": "image-classification"' in card and "Images are read as preprocessor_config.json" in card
    answer = cli("push", tmp_path / "model", "me/model", "--dry-run", "--json")
    assert answer.code == 0 and "preprocessor_config.json" in answer.out
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert not {"use_cache", "pad_token_id"} & {name for name, value in config.items() if value is not None}


def test_folders_without_our_file_are_recognised(cli, finished, pictures, tmp_path):
    run = finished()
    assert cli("merge", run, "--average", "--to", tmp_path / "model").code == 0
    expected = answers(cli, tmp_path / "model", "--rows", pictures)
    assert [each["image"] for each in expected[:2]] == ["0.png", "1.png"]
    for folder in (tmp_path / "model", run / "adapters" / "average"):
        (folder / "peerlora.json").unlink()
        assert shares(answers(cli, folder, "--rows", pictures)) == pytest.approx(shares(expected), abs=1e-5)
    pq.write_table(pq.read_table(pictures).rename_columns(["scan", "label", "site"]), tmp_path / "scans.parquet")
    found = answers(cli, tmp_path / "model", "--rows", tmp_path / "scans.parquet", "--text", "scan")
    assert found == expected
    for option, told in (("--max-length", "reads images"), ("--new-tokens", "writes no answers")):
        answer = cli("predict", tmp_path / "model", "--rows", pictures, option, 9)
        assert answer.code == 2 and told in answer.err
    answer = cli("predict", tmp_path / "model", "--rows", tmp_path / "scans.parquet")
    assert answer.code == 2 and "has no columns for task.kind=image-classification; expected image" in answer.err


def test_classes_are_scored_and_divided_by_label(finished):
    metrics = "eval.metrics=[balanced-accuracy, macro-f1, auroc]"
    run = finished(metrics, "partition={kind: dirichlet, concentration: 0.3}", "train.class_weights=balanced")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metric"] == "accuracy"
    start = read_events(run)[0]
    assert start.partition["names"] == NAMES and sum(map(sum, start.partition["counts"])) == 42
    told = [event for event in read_events(run) if type(event).__name__ == "Evaluated"]
    assert all(set(scores) == {"balanced-accuracy", "macro-f1", "auroc"} for scores in told[-1].metrics.values())
    assert set(told[-1].metrics) == {"own", "averaged"}


def test_a_private_run_of_images_keeps_its_promise(finished):
    pytest.importorskip("opacus")
    run = finished("privacy.epsilon=8", "algorithm.name=dec-lora")
    spent = json.loads((run / "summary.json").read_text())["privacy"]["spent"]
    assert all(7.9 < each <= 8 for each in spent["epsilon"])


def test_a_run_is_resumed_with_the_same_images_only(cli, finished, pictures, tmp_path):
    shutil.copy(pictures, tmp_path / "own.parquet")
    run = finished(train=tmp_path / "own.parquet")
    facts = json.loads((run / "run.json").read_text())["inputs"]
    assert set(facts["train"]) == {"rows", "images", "labels", "classes"}
    (run / "summary.json").unlink()
    table = pq.read_table(pictures)
    cells = table.column("image").to_pylist()
    cells[0], cells[3] = cells[3], cells[0]
    changed = table.set_column(0, "image", pa.array(cells)).replace_schema_metadata(table.schema.metadata)
    pq.write_table(changed, tmp_path / "own.parquet")
    answer = cli("train", "--resume", run)
    assert answer.code == 2 and "changed since (images" in answer.err
    shutil.copy(pictures, tmp_path / "own.parquet")
    answer = cli("train", "--resume", run)
    assert answer.code == 0, answer.err


def test_an_adapter_may_begin_where_another_run_ended(cli, finished, tmp_path):
    run = finished()
    again = finished(f"adapter.start={run / 'adapters' / 'average'}", name="again")
    one, other = (json.loads((each / "adapters/average/adapter_config.json").read_text()) for each in (run, again))
    assert one == other


def test_init_writes_a_config_that_runs(cli, pictures, picture_folder, models, tmp_path):
    for place, source in {"a": pictures, "b": picture_folder, "c": f"folder:{picture_folder}"}.items():
        to = tmp_path / f"{place}.yaml"
        answer = cli("init", "--train", source, "--to", to, "--model", models("vit"))
        assert answer.code == 0, answer.err
        assert "image-classification" in answer.out and "label label" in answer.out
        written = yaml.safe_load(to.read_text())
        assert written["data"]["train"] == (f"folder:{picture_folder}" if place != "a" else str(pictures))
        assert (written["data"]["columns"], written["partition"]["kind"]) == ({"image": "image"}, "dirichlet")
        answer = cli("train", to, "--out", tmp_path / place, "train.rounds=1", "clients=3", "topology=ring")
        assert answer.code == 0, answer.err
    answer = cli("init", "--train", pictures, "--to", tmp_path / "d.yaml")
    assert answer.code == 0 and yaml.safe_load((tmp_path / "d.yaml").read_text())["model"]["source"].startswith(
        "google/"
    )


REFUSED = {
    "no label": (["data.label=null"], "task.kind=image-classification needs data.label"),
    "columns of a chat": (["data.columns={messages: image}"], "task.kind=image-classification wants image"),
    "no such column": (["data.columns={image: scan}"], "has no column 'scan' for data.columns"),
    "a setting of chats": (["data.template=chatml"], "task.kind=chat"),
    "a table of texts": (["data.train=TEXTS"], "has no columns for task.kind=image-classification; expected image"),
    "a model of texts": (["model.source=BERT"], "give a folder with config.json and preprocessor_config.json"),
    "no image": (["data.train=BROKEN"], "row 2: cannot be read as PNG, JPEG, WebP or BMP"),
    "no folder": (["data.train=folder:nowhere"], "folder:nowhere: is no folder; expected one with a folder of PNG"),
    "an image processor of another size": (["model.source=LARGE"], "fails on images of 3 x 16 x 16 values"),
    "batch norms": (["model.source=RESNET"], "ResNetForImageClassification has batch norms"),
    "no attention": (["model.source=CONVNEXT"], "linear layers that exist: pwconv1, pwconv2"),
}


@pytest.fixture
def places(models, texts, pictures, tmp_path):
    """What a word of REFUSED means."""
    import transformers as tf

    large, broken = tmp_path / "large", tmp_path / "broken.parquet"
    shutil.copytree(models("vit"), large)
    settings = json.loads((large / "preprocessor_config.json").read_text())
    (large / "preprocessor_config.json").write_text(json.dumps(settings | {"size": {"height": 16, "width": 16}}))
    table = pq.read_table(pictures)
    cells = [
        {"bytes": b"none" if i == 1 else cell["bytes"]} for i, cell in enumerate(table.column("image").to_pylist())
    ]
    pq.write_table(table.set_column(0, "image", pa.array(cells)), broken)
    found = {"TEXTS": texts, "BERT": models("bert"), "LARGE": large, "BROKEN": broken}
    for name, model in {
        "RESNET": lambda: tf.ResNetModel(tf.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8)),
        "CONVNEXT": lambda: tf.ConvNextModel(tf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)),
    }.items():
        found[name] = tmp_path / name
        model().save_pretrained(found[name])
        shutil.copy(large / "preprocessor_config.json", found[name])
    return found


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_message_and_nothing_is_written(cli, yaml_file, pictures, places, tmp_path, case):
    words, told = REFUSED[case]
    for word, place in places.items():
        words = [each.replace(word, str(place)) for each in words]
    config = yaml_file(*TASK, f"data.train={pictures}", f"data.eval={pictures}", kind="vit")
    answer = cli("train", config, "--out", tmp_path / "run", *words)
    assert answer.code == 2, answer.err
    assert told in " ".join(answer.err.split()) and "Traceback" not in answer.err
    assert not (tmp_path / "run").exists()
