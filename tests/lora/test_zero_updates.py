"""Folders of adapters that add nothing to some layers, or to all: PEFT knows no rank 0."""

import json
from dataclasses import replace

import pytest
import torch
from peft_folders import FP32, trained
from test_merged import with_merges
from test_peft_io import load_with_peft, logits_of

from peerlora.lora.merged import Merged
from peerlora.lora.peft_io import export_adapter
from peerlora.runtime.compose import compose


def assert_peft_gives_our_logits(federation, source, x, folder, rank):
    export_adapter(folder, x, 1, federation.model, federation.export, rank)
    ours, inputs = logits_of(federation, x, 1)
    with torch.no_grad():
        theirs = load_with_peft(source, "sequence-classification", folder)(**inputs).logits
    assert (ours - theirs).abs().max() <= 5e-6 * float(theirs.abs().max().clamp_min(1))
    return json.loads((folder / "adapter_config.json").read_text())


def test_a_cut_start_is_the_base_in_rank_one(config, tmp_path):
    chosen = config("bert", FP32)
    federation = compose(chosen)
    written = assert_peft_gives_our_logits(federation, chosen.model.source, federation.start, tmp_path, rank=2)
    assert written["r"] == 1 and not written["rank_pattern"]


def test_a_cut_layer_without_an_update_has_rank_one(config, tmp_path):
    chosen = config("bert", FP32)
    federation = compose(chosen)
    x = trained(federation)
    first = next(iter(x.B))
    x.B[first].zero_()
    assert not x.B[first].any() and x.flat.any(), "B is a view of all factors"
    written = assert_peft_gives_our_logits(federation, chosen.model.source, x, tmp_path, rank=3)
    assert written["r"] == 3 and written["rank_pattern"] == {f"^{first}": 1}


@pytest.mark.parametrize("columns", [2, 16])
def test_merges_of_zero_are_written_whole(config, tmp_path, columns):
    chosen = config("bert", FP32)
    federation = compose(chosen)
    x = with_merges(federation.start, columns)
    nothing = {
        name: replace(each, left=0 * each.left.float(), right=0 * each.right.float(), dense=0 * each.dense.float())
        for name, each in x.merged.layers.items()
    }
    x = replace(x, merged=replace(x.merged, layers=nothing))
    assert isinstance(x.merged, Merged)
    assert_peft_gives_our_logits(federation, chosen.model.source, x, tmp_path, rank=None)
