"""A task of your own: classes learned by a contrastive loss, in which rows of a batch also compete for their class.

    python examples/own_task.py MODEL ROWS OUT [key=value ...]

A package of yours names it in its pyproject.toml, and `task.kind=contrastive` is known wherever it is installed:

    [project.entry-points."peerlora.tasks"]
    contrastive = "own_task:KIND"
"""

import sys
from dataclasses import dataclass

import peerlora
from peerlora.config.task_kinds import TaskKind
from peerlora.train.tasks import Classification

KIND = TaskKind("contrastive", "class", f"{__name__}:Contrastive", "SEQ_CLS", "AutoModelForSequenceClassification")
TEMPERATURE = 0.5  # of both softmaxes


@dataclass(frozen=True)
class Contrastive(Classification):
    """The symmetric loss of CLIP between rows and classes (Radford et al. 2021, arXiv 2103.00020); accuracy.

    A row is to prefer its class among all classes, and its class to prefer it among all rows of the client's batch.
    """

    kind = KIND

    def losses(self, logits, batch):
        """[client] the mean of both losses over each client's own rows."""
        z = logits.view(*batch.weights.shape, -1) / TEMPERATURE  # [client, row, class]
        own = batch.labels.view(*batch.weights.shape, 1)
        others = z.masked_fill(batch.weights[:, :, None] == 0, float("-inf"))  # filler rows compete for nothing
        by_class, by_row = z.log_softmax(2).gather(2, own), others.log_softmax(1).gather(2, own)
        both = (by_class + by_row)[:, :, 0].masked_fill(batch.weights == 0, 0.0)
        return -(both * batch.weights).sum(1) / 2


if __name__ == "__main__":
    peerlora.register_task("contrastive", KIND.target, KIND.peft_type)(Contrastive)
    model, rows, out, *words = sys.argv[1:]
    tree = {"model": {"source": model}, "data": {"train": rows, "text": ["text"], "label": "label"}, "clients": 4}
    tree |= {"task": {"kind": "contrastive"}, "algorithm": {"name": "dec-lora"}, "topology": "ring"}
    scores = peerlora.simulate(peerlora.load_config(tree, words), out).summary["scores"]
    print(f"contrastive: mean client {scores['own_mean']:.3f}, averaged {scores['averaged']:.3f}")
