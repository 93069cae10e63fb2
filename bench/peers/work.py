"""The common work of all runners, written once into a folder: base model, adapter, rows, graph, and who draws what.

    python bench/peers/work.py --job short --to FOLDER

peerlora itself divides the rows and draws the batches, so its normal run needs no table; all others read the table.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

WORDS_PER_ROW = 30  # 32 tokens with [CLS] and [SEP]
GROUP = 50  # words in each of the two groups; the other words of the vocabulary never occur
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


@dataclass(frozen=True)
class Job:
    """How much work, and of which kind."""

    rounds: int
    steps: int
    nodes: int = 6
    rows: int = 256
    evaluated: int = 512
    batch: int = 16
    lr: float = 1e-3
    rank: int = 8
    alpha: int = 16
    vocabulary: int = 2000
    width: int = 128
    layers: int = 2
    seed: int = 0


JOBS = {
    "short": Job(rounds=3, steps=10),
    "long": Job(rounds=100, steps=5),
    "gossip": Job(rounds=100, steps=1, batch=4),  # little learning between two exchanges: what a round itself costs
}


def write_work(folder: Path, job: Job) -> None:
    """Everything that a runner may read; nothing else is common to them."""
    folder.mkdir(parents=True)
    write_base(folder / "base", job)
    pq.write_table(train_rows(job), folder / "train.parquet")
    pq.write_table(draw_rows(job, np.random.default_rng([job.seed, 1]), job.evaluated, 0.5), folder / "eval.parquet")
    from peerlora.runtime.compose import compose

    federation = compose(load_settings(folder, asdict(job), start=False))
    write_adapter(folder / "adapter", federation)
    add_tokens(folder / "train.parquet", federation.train_data)
    add_tokens(folder / "eval.parquet", federation.eval_data)
    pq.write_table(drawn_batches(job, federation.learner.shards), folder / "batches.parquet")
    (folder / "job.json").write_text(json.dumps(asdict(job) | {"W": federation.topology.at(0).W.tolist()}, indent=1))


def load_settings(folder: Path, job: dict, threads: int = 1, start: bool = True):
    """The work as a peerlora config; ``start``: from the common adapter, which must be there."""
    from peerlora import load_config

    return load_config(
        {
            "model": {"source": str(folder / "base")},
            "adapter": {
                "rank": job["rank"],
                "alpha": job["alpha"],
                "start": str(folder / "adapter") if start else None,
            },
            "data": {
                "train": f"parquet:{folder / 'train.parquet'}",
                "eval": f"parquet:{folder / 'eval.parquet'}",
                "text": ["text"],
                "label": "label",
            },
            "partition": {"kind": "column", "column": "node"},
            "clients": job["nodes"],
            "topology": "ring",
            "algorithm": "dec-lora",
            "train": {"rounds": job["rounds"], "local_steps": job["steps"], "batch": job["batch"], "lr": job["lr"]},
            "eval": {"every": job["rounds"]},
            "threads": threads,
            "seed": job["seed"],
        }
    )


def write_base(folder: Path, job: Job) -> None:
    """A small BERT with random weights, head included, and a tokenizer that knows one word per id."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=job.vocabulary,
        hidden_size=job.width,
        num_hidden_layers=job.layers,
        num_attention_heads=2,
        intermediate_size=4 * job.width,
        max_position_embeddings=64,
    )
    torch.manual_seed(job.seed)
    BertForSequenceClassification(config).save_pretrained(folder)
    write_tokenizer(folder, job.vocabulary)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocabulary))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)


def train_rows(job: Job) -> pa.Table:
    """Every node's rows; even nodes hold seven of ten rows of label 0, odd nodes of label 1."""
    parts = []
    for node in range(job.nodes):
        share = 0.7 if node % 2 else 0.3
        part = draw_rows(job, np.random.default_rng([job.seed, 2, node]), job.rows, share)
        parts.append(part.append_column("node", pa.array([node] * job.rows)))
    return pa.concat_tables(parts)


def draw_rows(job: Job, draw: np.random.Generator, rows: int, share: float) -> pa.Table:
    """Texts of two groups of words; the label says which group occurs more often, ``share`` of them being 1."""
    labels = (np.arange(rows) < round(share * rows)).astype(int)
    first, middle, end = (len(SPECIAL) + GROUP * i for i in range(3))
    texts = []
    for label in labels:
        often = draw.integers(WORDS_PER_ROW * 2 // 3, WORDS_PER_ROW + 1)
        count = [WORDS_PER_ROW - often, often] if label else [often, WORDS_PER_ROW - often]
        low = draw.integers(first, middle, count[0])
        high = draw.integers(middle, end, count[1])
        texts.append(" ".join(f"w{i}" for i in draw.permutation(np.concatenate([low, high]))))
    return pa.table({"text": texts, "label": labels}).take(draw.permutation(rows))


def write_adapter(folder: Path, federation) -> None:
    from peerlora.lora.peft_io import export_adapter

    export_adapter(folder, federation.start, 0, federation.model, federation.export)


def add_tokens(path: Path, data) -> None:
    """The ids that peerlora found for each row, so that no other runner needs a tokenizer."""
    ids = pa.ListArray.from_arrays(pa.array(data.starts, pa.int32()), pa.array(data.ids, pa.int32()))
    pq.write_table(pq.read_table(path).append_column("ids", ids), path)


def drawn_batches(job: Job, shards) -> pa.Table:
    """Which rows of train.parquet each node trains on in each step of each round."""
    found = [
        {"node": node, "round": t, "step": k, "rows": rows.tolist()}
        for node in range(job.nodes)
        for t in range(job.rounds)
        for k, rows in enumerate(shards.rows(node, t, job.steps))
    ]
    return pa.Table.from_pylist(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS, default="short")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    write_work(options.to, JOBS[options.job])
