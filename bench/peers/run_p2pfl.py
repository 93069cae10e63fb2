"""p2pfl on the same work: nodes in one process that talk through memory, on a ring, with Ray off.

    run_p2pfl.py WORK ANSWER stock|tuned

Its aggregator gives every node the exact mean of all, whatever the graph.  The stock settings pause two seconds between
two sendings of models; tuned pauses a twentieth of a second.
"""

# pyright: reportMissingImports=false
# p2pfl is installed in an environment of its own.

import threading
import time
from pathlib import Path

import numpy as np
import torch
from local import State, Work, arguments, write_answer
from p2pfl.settings import Settings

Settings.general.DISABLE_RAY = True  # before the next imports, which would start it

from datasets import Dataset  # noqa: E402
from p2pfl.communication.protocols.protobuff.memory import MemoryCommunicationProtocol  # noqa: E402
from p2pfl.communication.protocols.protobuff.memory.client import MemoryClient  # noqa: E402
from p2pfl.learning.dataset.p2pfl_dataset import P2PFLDataset  # noqa: E402
from p2pfl.learning.frameworks import Framework  # noqa: E402
from p2pfl.learning.frameworks.learner import Learner  # noqa: E402
from p2pfl.learning.frameworks.p2pfl_model import P2PFLModel  # noqa: E402
from p2pfl.management.logger import logger  # noqa: E402
from p2pfl.node import Node  # noqa: E402
from p2pfl.utils.topologies import TopologyFactory, TopologyType  # noqa: E402
from p2pfl.utils.utils import set_standalone_settings, wait_convergence  # noqa: E402

PERIODS = {"stock": None, "tuned": 0.05}
FRAMEWORK = Framework.PYTORCH.value


class Adapter(P2PFLModel):
    """What p2pfl exchanges: the trained tensors alone."""

    model: State

    def get_parameters(self) -> list[np.ndarray]:
        """The tensors in their order."""
        return [value.numpy() for value in self.model.values()]

    def set_parameters(self, params: list[np.ndarray] | bytes) -> None:
        """Take over what another node sent, or what was averaged."""
        if isinstance(params, bytes):
            params, told = self.decode_parameters(params)
            self.additional_info.update(told)
        pairs = zip(self.model, params, strict=True)
        self.model = {name: torch.from_numpy(np.array(value)) for name, value in pairs}

    def get_framework(self) -> str:
        """Which of its aggregators' forms p2pfl is to use."""
        return FRAMEWORK


class LocalSteps(Learner):
    """One node's learner, with a model of its own since all nodes train at the same time."""

    def __init__(self, folder: Path, node: int):
        super().__init__()
        self.work, self.node = Work(folder), node
        self.t, self.began = 0, 0.0

    def fit(self) -> P2PFLModel:
        """The local steps of one round."""
        self.began = self.began or time.time()
        adapter = self.get_model()
        adapter.model = self.work.train(adapter.model, self.node, self.t)
        adapter.set_contribution([self.addr], self.work.job["rows"])
        self.t += 1
        return adapter

    def evaluate(self) -> dict[str, float]:
        """No numbers during the rounds, as in all other runners."""
        return {}

    def interrupt_fit(self) -> None:
        """Never asked for here."""
        raise RuntimeError("the benchmark never interrupts a node")

    def get_framework(self) -> str:
        """The same as the model's."""
        return FRAMEWORK


class Counter:
    """Counts the bytes of all messages between nodes."""

    def __init__(self):
        self.bytes, self.lock, self.send = 0, threading.Lock(), MemoryClient.send

    def install(self) -> None:
        """From now on every message passes here."""

        def counted(client, message, *args, **kwargs):
            with self.lock:
                self.bytes += message.ByteSize()
            return self.send(client, message, *args, **kwargs)

        MemoryClient.send = counted


def run(folder: Path, out: Path, period: float | None) -> None:
    set_standalone_settings()
    Settings.general.LOG_LEVEL = "ERROR"
    logger.set_level("ERROR")
    if period is not None:
        Settings.gossip.MODELS_PERIOD = period
    counter = Counter()
    counter.install()
    first = Work(folder)
    count = first.job["nodes"]
    learners = [LocalSteps(folder, i) for i in range(count)]
    nodes = [start_node(learner, first) for learner in learners]
    TopologyFactory.connect_nodes(TopologyFactory.generate_matrix(TopologyType.RING, count), nodes)
    wait_convergence(nodes, count - 1, wait=60)
    nodes[0].set_start_learning(rounds=first.job["rounds"], epochs=1, trainset_size=count)
    while not all(node.learning_workflow.finished for node in nodes):
        time.sleep(0.02)
    ended = time.time()
    states = [node.get_model().model for node in nodes]
    check(learners, first.job["rounds"])
    began = min(learner.began for learner in learners)
    write_answer(out, first, states, began, ended, counter.bytes, "counted", "mean of all nodes, not of neighbours")
    for node in nodes:
        node.stop()


def start_node(learner: LocalSteps, work: Work) -> Node:
    rows = Dataset.from_dict({"row": list(range(work.job["rows"]))})
    data = P2PFLDataset(rows, batch_size=work.job["batch"], dataset_name="peers")
    node = Node(Adapter(work.start()), data, learner=learner, protocol=MemoryCommunicationProtocol())
    node.start()
    return node


def check(learners: list[LocalSteps], rounds: int) -> None:
    done = [learner.t for learner in learners]
    if done != [rounds] * len(learners):
        raise RuntimeError(f"nodes trained {done} rounds; expected {rounds} each")


if __name__ == "__main__":
    place, answer, (pauses,) = arguments()
    run(place, answer, PERIODS[pauses])
