"""A plain PyTorch loop whose adapter is averaged with other sites': three lines more than it had.

    python examples/own_loop.py MODEL ROWS PEER.yaml IDENTITY MEMBERS OUT

MODEL is a hub id or a local folder, ROWS a JSONL file with `text` and `label`.  PEER.yaml, IDENTITY and MEMBERS are as
of `peerlora peer`; start it at all sites at the same time.
"""

import itertools
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import peerlora


def main(source: str, rows: str, config: str, identity: str, members: str, out: str):
    set_seed(0)  # the head is drawn alike at all sites
    data = load_dataset("json", data_files=rows, split="train").class_encode_column("label")
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=data.features["label"].num_classes)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)

    def collate(batch):
        inputs = tokenizer([row["text"] for row in batch], padding=True, truncation=True, return_tensors="pt")
        return dict(inputs, labels=torch.tensor([row["label"] for row in batch]))

    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate)
    with peerlora.join(model, optimizer, config, identity=identity, members=members, out=out) as peer:  # 1
        for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            peer.log({"loss": loss.item()})  # for the report's curves; it trains without
            peer.step()  # 2
            if peer.over:  # 3
                break
    if peer.result:  # of several processes, the first one has it
        print(f"{peer.result.summary['rounds']} rounds, the adapter is in {peer.result.run / 'adapters'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
