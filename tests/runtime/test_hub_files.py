"""Which files of a folder an upload holds."""

import re
from pathlib import Path

import pytest
import transformers

from peerlora.runtime.hub import plan_upload


def tokenizer_files():
    """The names of the files that the tokenizers of the library write."""
    names = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}
    for module in (Path(transformers.__file__).parent / "models").glob("*/tokenization*.py"):
        listed = re.search(r"^VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", module.read_text(encoding="utf-8"), flags=re.S | re.M)
        names |= set(re.findall(r':\s*"([^"]+)"', listed[1])) if listed else set()
    return names


@pytest.fixture
def folder(tmp_path):
    """A folder of a whole model, with weights and settings."""
    for name in ("config.json", "model.safetensors", "generation_config.json", "peerlora.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_every_file_that_a_tokenizer_of_the_library_writes_is_uploaded(folder):
    names = tokenizer_files()
    assert {"source.spm", "sentencepiece.bpe.model", "spiece.model", "merges.txt", "vocab.txt", "bpe.codes"} < names
    for name in names:
        (folder / name).write_text("x")
    assert plan_upload(folder, "me/model", True).files.keys() >= names | {"config.json", "model.safetensors"}


def test_further_chat_templates_are_uploaded_and_nothing_else(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    (folder / "additional_chat_templates" / "notes.md").write_text("x")
    (folder / "base").mkdir()
    for name in ("pytorch_model.bin", "optimizer.pt", "notes.txt", "base/config.json", "run.py"):
        (folder / name).write_text("x")
    found = plan_upload(folder, "me/model", True).files
    assert set(found) == {
        *("config.json", "model.safetensors", "generation_config.json", "peerlora.json"),
        "additional_chat_templates/tool_use.jinja",
    }
    assert found["additional_chat_templates/tool_use.jinja"] == 1
