"""Flower's client side.  A module of its own, so that a worker process imports it once and keeps its model."""

# pyright: reportMissingImports=false
# Flower is installed in an environment of its own.

from functools import lru_cache
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from local import Work

app = ClientApp()


@lru_cache(maxsize=1)
def work_of(folder: str) -> Work:
    return Work(Path(folder))


@app.query()
def prepare(message: Message, context: Context) -> Message:
    """Load the model before the rounds, and tell which node this is."""
    work_of(str(message.content["config"]["folder"]))
    who = MetricRecord({"node": int(context.node_config["partition-id"])})
    return Message(RecordDict({"metrics": who}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    work = work_of(str(config["folder"]))
    node = int(context.node_config["partition-id"])
    state = message.content["arrays"].to_torch_state_dict()
    trained = work.train(state, node, int(config["server-round"]) - 1)
    content = {"arrays": ArrayRecord(trained), "metrics": MetricRecord({"num-examples": work.job["rows"]})}
    return Message(RecordDict(content), reply_to=message)
