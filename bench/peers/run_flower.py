"""Flower's simulation of the same work: FedAvg by its own strategy, or a ring that the server app mixes.

run_flower.py WORK ANSWER star|ring
"""

# pyright: reportMissingImports=false
# Flower is installed in an environment of its own.

import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from flower_client import app as client_app
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from local import State, Work, arguments, mean_of, message_bytes, write_answer

RESOURCES = {
    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    "init_args": {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False},
}
Rule = Callable[[Grid, Work, dict[int, int]], list[State]]


def run(folder: Path, out: Path, rule: Rule) -> None:
    """Loading the model in every worker counts as start-up; the rounds are timed inside the server app."""
    server_app = ServerApp()
    work = Work(folder)
    nodes = work.job["nodes"]

    @server_app.main()
    def main(grid: Grid, _) -> None:
        addresses = prepare(grid, work)
        began = time.time()
        states = rule(grid, work, addresses)
        ended = time.time()
        sent = 2 * nodes * work.job["rounds"] * message_bytes(states[0])
        write_answer(out, work, states, began, ended, sent, "computed", "down to each node and up again")

    run_simulation(server_app, client_app, num_supernodes=nodes, backend_config=RESOURCES)


def prepare(grid: Grid, work: Work) -> dict[int, int]:
    """Wait for all nodes and let them load; Flower's address of every node."""
    while len(list(grid.get_node_ids())) < work.job["nodes"]:
        time.sleep(0.1)
    config = RecordDict({"config": ConfigRecord({"folder": str(work.folder)})})
    asked = [Message(config, dst_node_id=address, message_type="query") for address in grid.get_node_ids()]
    replies = list(grid.send_and_receive(asked))
    return {int(reply.content["metrics"]["node"]): reply.metadata.src_node_id for reply in replies}


def star(grid: Grid, work: Work, addresses: dict[int, int]) -> list[State]:
    nodes = len(addresses)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    config = ConfigRecord({"folder": str(work.folder)})
    result = strategy.start(grid, ArrayRecord(OrderedDict(work.start())), work.job["rounds"], train_config=config)
    return [result.arrays.to_torch_state_dict()] * nodes


def ring(grid: Grid, work: Work, addresses: dict[int, int]) -> list[State]:
    """One state per node, mixed with W between the rounds: Flower itself knows no graph."""
    states = [work.start() for _ in addresses]
    nodes = {address: node for node, address in addresses.items()}
    for t in range(work.job["rounds"]):
        replies = grid.send_and_receive([order(work, states[i], t, addresses[i]) for i in range(len(states))])
        trained = {nodes[reply.metadata.src_node_id]: reply.content["arrays"] for reply in replies}
        everybody = [trained[i].to_torch_state_dict() for i in range(len(states))]
        states = [mean_of(everybody, row) for row in work.W.tolist()]
    return states


def order(work: Work, state: State, t: int, address: int) -> Message:
    config = ConfigRecord({"folder": str(work.folder), "server-round": t + 1})
    content = RecordDict({"arrays": ArrayRecord(OrderedDict(state)), "config": config})
    return Message(content, dst_node_id=address, message_type="train")


if __name__ == "__main__":
    place, answer, (graph,) = arguments()
    run(place, answer, {"star": star, "ring": ring}[graph])
