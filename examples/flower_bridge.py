"""One loop, two federations: a Flower client in this run, a peer without a server in the next.

    flwr run, with this file's `app` as the ClientApp, and FedAvg at the server; or
    python examples/flower_bridge.py MODEL ROWS PEER.yaml IDENTITY MEMBERS OUT

MODEL and ROWS as in own_loop.py; of Flower they are `model` and `rows` of the run's config.
"""

import sys

import torch
from datasets import load_dataset
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import peerlora
from peerlora.flower import put_arrays, to_arrays

app = ClientApp()


def load(source: str, rows: str):
    set_seed(0)
    data = load_dataset("json", data_files=rows, split="train").class_encode_column("label")
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=data.features["label"].num_classes)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4))
    inputs = AutoTokenizer.from_pretrained(source)(
        list(data["text"]), padding=True, truncation=True, return_tensors="pt"
    )
    batches = torch.randperm(len(data)).split(8)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    return model, optimizer, [dict(inputs, labels=torch.tensor(list(data["label"]))), batches]


def step(model, optimizer, batch):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@app.train()
def train(message: Message, context: Context) -> Message:
    model, optimizer, (rows, batches) = load(str(context.run_config["model"]), str(context.run_config["rows"]))
    put_arrays(model, message.content["arrays"])
    for own in batches:
        step(model, optimizer, {name: values[own] for name, values in rows.items()})
    metrics = MetricRecord({"num-examples": len(rows["labels"])})
    return Message(RecordDict({"arrays": to_arrays(model), "metrics": metrics}), reply_to=message)


if __name__ == "__main__":
    model, optimizer, (rows, batches) = load(*sys.argv[1:3])
    config, identity, members, out = sys.argv[3:]
    with peerlora.join(model, optimizer, config, identity=identity, members=members, out=out) as peer:
        while not peer.over:
            step(model, optimizer, {name: values[batches[0]] for name, values in rows.items()})
            peer.step()
