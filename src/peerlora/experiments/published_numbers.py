"""What papers report: accuracies, how they were measured, and how we know.

A protocol holds what is known, in the words that ``published.describe_protocol`` uses for our own runs; several values
where the paper varies an aspect or tasks differ in it, none where it was not found.  Nothing here was read in the
papers' own tables: each paper says where its numbers come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GLUE = ("SST-2", "QNLI", "QQP", "MNLI", "RTE", "MRPC", "CoLA", "STS-B")
SERVER = "complete (a server)"
OWN_MODELS = "every client's own model"
Names = tuple[str, ...]
Protocol = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Number:
    """One published figure, as a fraction of 1."""

    value: float
    label: str
    """The paper's name of the method, and what else tells this number from others."""
    tasks: tuple[str, ...]
    """What it is the mean over."""
    methods: tuple[str, ...] = ()
    """Our methods that it stands beside; none: a reference without clients."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted setting -> the value that a run of ours must have to stand beside it."""
    over: str = ""
    """In place of the tasks' names, where the notes do not name them or the metric is no accuracy."""


@dataclass(frozen=True)
class Paper:
    """What a paper reports, and how it was measured: aspect -> the values it takes, none where not found."""

    name: str
    trust: str
    """Where the numbers come from."""
    protocol: Protocol
    numbers: tuple[Number, ...]
    measure: str = "mean client"
    """Our measure that is nearest to theirs."""


_DIRICHLET = {alpha: {"partition.kind": "dirichlet", "partition.concentration": alpha} for alpha in (0.5, 1.0, 100.0)}
_SECOND_HAND = "Second hand: read in others' notes on the paper"
_LORA: Names = ("fedit", "dec-lora")  # factor-wise averaging, by a server or by gossip
_IN_TURN = {"algorithm.interval": 1}  # RoLoRA; our method can also switch less often
_BINARY = "3 x [0.9, 0.1], 3 x [0.1, 0.9], 4 x [0.5, 0.5]"
_THREE = "4 x [0.9, 0.05, 0.05], 3 x [0.05, 0.9, 0.05], 3 x [0.05, 0.05, 0.9]"
_FOUR = ("SST-2", "QNLI", "QQP", "MNLI")
_FIVE = (*_FOUR, "RTE")


def _column(tasks: Sequence[str], label: str, methods: Names, values: Sequence[float], **settings: Any):
    """One method's row of a table by task."""
    return tuple(Number(value, label, (task,), methods, settings) for task, value in zip(tasks, values, strict=True))


_NOT_FOUND = ("training rows per client", "schedule of the rate", "optimiser's memory", "rows of the search")
_DECENTRALISED: Protocol = {
    "model": ("roberta-large",),
    "data": _FOUR,
    "evaluation rows": ("validation",),
    "tokens": ("128",),
    "clients": ("10",),
    "rank": ("8",),
    "alpha": ("16",),
    "dropout": ("0.1",),
    "adapted layers": ("query, value",),
    "head": ("frozen",),
    "partition": (_BINARY, _THREE),
    "budget": ("150 rounds x 20 steps x 32 rows",),
    "optimiser": ("adamw with library defaults",),
    "evaluation": (OWN_MODELS,),
    "round reported": (),
    **dict.fromkeys(_NOT_FOUND, ()),
}

_ADF = Paper(
    "ADF-LoRA, arXiv 2511.18291",
    f"{_SECOND_HAND}; two independent notes agree on the set-up, one gives the numbers.",
    _DECENTRALISED
    | {
        "topology": ("random, p 0.1",),
        "weights": ("half and half in a pair, for several contacts not found",),
        "rates": ("searched among 0.0005, 0.001, 0.002, 0.005",),
        "seeds": (),
    },
    (
        Number(0.8458, "LoRA", _FOUR, ("dec-lora",)),
        Number(0.7304, "LoRA", ("MNLI",), ("dec-lora",)),
        Number(0.8268, "FFA-LoRA", _FOUR, ("ffa-lora",)),
        Number(0.8284, "RoLoRA", _FOUR, ("rolora",), _IN_TURN),
        Number(0.8435, "ADF-LoRA T=1", _FOUR, ("adf-lora",), {"algorithm.interval": 1}),
        Number(0.8505, "ADF-LoRA T=5", _FOUR, ("adf-lora",), {"algorithm.interval": 5}),
        Number(0.7624, "ADF-LoRA T=5", ("MNLI",), ("adf-lora",), {"algorithm.interval": 5}),
        Number(0.8393, "ADF-LoRA T=10", _FOUR, ("adf-lora",), {"algorithm.interval": 10}),
        Number(0.8421, "ADF-LoRA T=20", _FOUR, ("adf-lora",), {"algorithm.interval": 20}),
    ),
)

_TAD = Paper(
    "TAD-LoRA, arXiv 2602.00451",
    f"{_SECOND_HAND}; a reproduction and an audit agree on the set-up, one source gives the numbers. T was chosen "
    "among 1, 2, 3, 5, 10, 15; per cell not found.",
    _DECENTRALISED
    | {
        "topology": (*(f"random, p {p}" for p in ("0.5", "0.2", "0.1", "0.05", "0.02", "0.01")), "ring"),
        "weights": (),
        "rates": ("searched among 0.0002, 0.0005, 0.001, 0.002, 0.005",),
        "seeds": ("3",),
    },
    tuple(
        Number(value, f"{label}, random p={p}", _FOUR, methods, {"topology.kind": "random", "topology.p": p})
        for p, lora, tad in ((0.5, 0.8754, 0.8731), (0.1, 0.8375, 0.8418), (0.02, 0.7798, 0.8032))
        for label, methods, value in (("LoRA", ("dec-lora",), lora), ("TAD-LoRA", ("tad-lora",), tad))
    ),
)

_AT_A_SERVER: Protocol = {"topology": (SERVER,), "evaluation": ("the server's model",), "round reported": ()}

_ROLORA = Paper(
    "RoLoRA, arXiv 2502.01755",
    f"{_SECOND_HAND}. They disagree whether the 20 units of local work are steps or epochs.",
    _AT_A_SERVER
    | {
        "model": ("roberta-large",),
        "clients": ("3", "10", "20", "50"),
        "rank": ("4", "8"),
        "alpha": (),
        "adapted layers": ("query, value",),
        "partition": ("iid", "dirichlet, concentration 0.5"),
        "budget": ("500 rounds (RTE 200) x 20 steps or epochs x 32 rows (SST-2 64)",),
        "rates": ("between 0.0005 and 0.1",),
        **dict.fromkeys(("optimiser", "seeds", "weights", "evaluation rows", "head"), ()),
    },
    (
        *_column(_FIVE, "LoRA, 50 clients, rank 4", _LORA, (0.93, 0.7813, 0.7760, 0.5264, 0.5223)),
        *_column(_FIVE, "FFA-LoRA, 50 clients, rank 4", ("ffa-lora",), (0.9323, 0.8505, 0.7844, 0.6997, 0.5572)),
        *_column(_FIVE, "FlexLoRA, 50 clients, rank 4", ("flexlora",), (0.5408, 0.5540, 0.72, 0.3914, 0.5271)),
        *_column(_FIVE, "RoLoRA, 50 clients, rank 4", ("rolora",), (0.9480, 0.90, 0.8571, 0.8298, 0.7557), **_IN_TURN),
        *(
            Number(value, f"{label}, {context}", _FIVE, methods, settings)
            for context, values in (
                ("3 clients, rank 4", (0.8820, 0.8748, 0.8828)),
                ("20 clients, rank 4", (0.7890, None, 0.8703)),
                ("50 clients, rank 8", (0.6403, 0.7246, 0.8627)),
            )
            for (label, methods, settings), value in zip(
                (("LoRA", _LORA, {}), ("FFA-LoRA", ("ffa-lora",), {}), ("RoLoRA", ("rolora",), _IN_TURN)),
                values,
                strict=True,
            )
            if value is not None
        ),
        Number(0.8119, "LoRA, 10 clients, Dirichlet 0.5", ("MNLI",), _LORA, _DIRICHLET[0.5]),
        Number(0.8260, "RoLoRA, 10 clients, Dirichlet 0.5", ("MNLI",), ("rolora",), _IN_TURN | _DIRICHLET[0.5]),
    ),
)

_FEDROT_METHODS: tuple[tuple[str, Names, dict[str, Any]], ...] = (
    ("FedIT", _LORA, {}),
    ("FlexLoRA", ("flexlora",), {}),
    ("FFA-LoRA", ("ffa-lora",), {}),
    ("RoLoRA", ("rolora",), _IN_TURN),
    ("FedRot-LoRA", ("fedrot-lora",), {}),
)
_FEDROT_TABLE = {  # clients -> task -> accuracy, methods in the order above
    3: {
        "SST-2": (0.953, 0.949, 0.768, 0.951, 0.954),
        "QNLI": (0.926, 0.910, 0.926, 0.917, 0.926),
        "QQP": (0.771, 0.832, 0.838, 0.841, 0.842),
        "RTE": (0.840, 0.813, 0.830, 0.854, 0.868),
        "MNLI": (0.866, 0.845, 0.862, 0.868, 0.876),
    },
    10: {
        "SST-2": (0.949, 0.922, 0.946, 0.956, 0.958),
        "QNLI": (0.913, 0.876, 0.894, 0.911, 0.921),
        "QQP": (0.849, 0.801, 0.849, 0.863, 0.868),
        "RTE": (0.621, 0.592, 0.600, 0.805, 0.798),
        "MNLI": (0.849, 0.792, 0.840, 0.858, 0.864),
    },
    50: {
        "SST-2": (0.928, 0.752, 0.933, 0.851, 0.947),
        "QNLI": (0.803, 0.733, 0.851, 0.893, 0.920),
        "QQP": (0.814, 0.739, 0.716, 0.847, 0.854),
        "RTE": (0.622, 0.632, 0.658, 0.733, 0.787),
        "MNLI": (0.673, 0.677, 0.701, 0.798, 0.859),
    },
}

_FEDROT = Paper(
    "FedRot-LoRA, arXiv 2602.23638",
    "Read in a figure and in configs of the authors' repository; rounds, steps and rate are suggestions in comments, "
    "overridden per run.",
    _AT_A_SERVER
    | {
        "model": ("roberta-large",),
        "tokens": ("128",),
        "clients": ("3", "10", "50"),
        "rank": ("4",),
        "alpha": ("8",),
        "dropout": ("0.05",),
        "partition": tuple(f"dirichlet, concentration {alpha}" for alpha in _DIRICHLET),
        "budget": ("250 rounds x 10 to 20 steps x 128 rows",),
        "rates": ("0.02 suggested",),
        "precision": ("half precision",),
        "weights": ("by rows",),
        **dict.fromkeys(("optimiser", "seeds", "evaluation rows", "head", "adapted layers"), ()),
    },
    (
        *(
            Number(value, f"{label}, {clients} clients", (task,), methods, settings)
            for clients, tasks in _FEDROT_TABLE.items()
            for task, values in tasks.items()
            for (label, methods, settings), value in zip(_FEDROT_METHODS, values, strict=True)
        ),
        *(  # at 0.5 it is the table's line of 3 clients
            Number(
                value,
                f"{label}, clients not said, Dirichlet {alpha:g}",
                ("MNLI",),
                methods,
                settings | _DIRICHLET[alpha],
            )
            for alpha, values in ((100.0, (0.868, 0.767, 0.884)), (1.0, (0.864, 0.780, 0.873)))
            for (label, methods, settings), value in zip(
                (_FEDROT_METHODS[0], *_FEDROT_METHODS[3:]), values, strict=True
            )
        ),
    ),
)

_RING = {"topology.kind": "ring"}
_DEC = Paper(
    "Dec-LoRA, arXiv 2501.15361",
    f"{_SECOND_HAND}. A later version of the paper has other values.",
    {
        "model": ("roberta-base",),
        "clients": ("10", "20"),
        "rank": ("2", "4", "8", "16"),
        "budget": ("20 rounds x 1 steps x 32 rows", "10 rounds x 5 steps x 32 rows", "100 rounds by rank"),
        "rates": ("0.001, given",),
        "topology": ("ring", "erdos-renyi"),
        "evaluation": ("the averaged model",),
        "round reported": ("the best",),
        "evaluation rows": ("validation",),
        **dict.fromkeys(("alpha", "optimiser", "adapted layers", "partition", "seeds", "weights"), ()),
    },
    (
        Number(0.9381, "Dec-LoRA, ring, rank 16, 1 step", ("SST-2",), ("dec-lora",), _RING),
        Number(0.9461, "Dec-LoRA, ring, rank 16, 5 steps", ("SST-2",), ("dec-lora",), _RING),
        Number(0.9392, "Dec-LoRA, graph and rank not found", ("SST-2",), ("dec-lora",)),
        Number(0.9079, "Dec-LoRA, graph and rank not found", ("QNLI",), ("dec-lora",)),
        *(
            Number(value, f"Dec-LoRA, ring, rank {rank}", ("MRPC",), ("dec-lora",), _RING, "F1 on MRPC")
            for rank, value in ((2, 0.8931), (4, 0.8920), (8, 0.8916))
        ),
    ),
    "averaged model",
)

_DEC_AGAIN = Paper(
    "Dec-LoRA, an independent re-implementation",
    "Second hand: read in others' notes on it. Its standard deviations over seeds are 0.0025, 0.0038 and 0.0020; how "
    "its third line mixes products was not found.",
    {
        "clients": ("10",),
        "rank": ("4", "16"),
        "topology": ("ring",),
        "partition": ("quantity",),
        "seeds": ("4",),
        "round reported": ("the best",),
        "evaluation rows": ("validation",),
        **dict.fromkeys(("model", "budget", "rates", "optimiser", "evaluation"), ()),
    },
    (
        Number(0.9450, "Dec-LoRA, ring, rank 16", ("SST-2",), ("dec-lora",), _RING),
        Number(0.9447, "Dec-LoRA, ring, rank 4", ("SST-2",), ("dec-lora",), _RING),
        Number(0.9475, "products mixed, ring, rank 16", ("SST-2",), ("decaf",), _RING),
    ),
)

_FEDEX_TASKS = ("CoLA", "RTE", "MRPC", "SST-2", "QNLI", "STS-B")
_FEDEX = Paper(
    "FedEx-LoRA, arXiv 2410.09432",
    f"{_SECOND_HAND}; the set-up was read in the authors' code. Which metric each task counts with was not found.",
    _AT_A_SERVER
    | {
        "model": ("roberta-base",),
        "data": _FEDEX_TASKS,
        "clients": ("3",),
        "rank": ("4",),
        "alpha": ("8",),
        "head": ("mixed",),
        "budget": ("50 rounds x 3 epochs x 128 rows",),
        "rates": ("0.001, given",),
        "weights": ("equal",),
        **dict.fromkeys(("optimiser", "partition", "seeds", "evaluation rows"), ()),
    },
    (
        Number(0.8342, "FedIT", _FEDEX_TASKS, _LORA),
        Number(0.8213, "FFA-LoRA", _FEDEX_TASKS, ("ffa-lora",)),
        Number(0.8439, "FedEx-LoRA", _FEDEX_TASKS, ("fedex-lora",)),
        Number(0.8431, "LoRA with all rows in one place", _FEDEX_TASKS),
    ),
)

_SOME_FIVE = "mean over five GLUE tasks, which ones not found"
_FEDSA = Paper(
    "FedSA-LoRA, arXiv 2410.01463",
    f"{_SECOND_HAND}; the set-up was read in the authors' code. Another reader gives 0.9048 for FedSA-LoRA.",
    {
        "model": ("roberta-large",),
        "clients": ("3",),
        "rank": ("8",),
        "alpha": ("16",),
        "dropout": ("0.05",),
        "head": ("private",),
        "partition": ("dirichlet, concentration 0.5",),
        "budget": ("1000 rounds x 10 steps x 128 rows",),
        "optimiser": ("sgd",),
        "rates": ("0.02, given",),
        "topology": (SERVER,),
        "evaluation": (OWN_MODELS,),
        **dict.fromkeys(("data", "seeds", "round reported", "evaluation rows"), ()),
    },
    (
        Number(0.8933, "LoRA", GLUE, _LORA, over=_SOME_FIVE),
        Number(0.8939, "FFA-LoRA", GLUE, ("ffa-lora",), over=_SOME_FIVE),
        Number(0.9043, "FedSA-LoRA", GLUE, ("fedsa-lora",), over=_SOME_FIVE),
    ),
)

_SOME_FOUR = "mean over four GLUE tasks, which ones not found"
_RAC = Paper(
    "RAC-LoRA, arXiv 2410.08305",
    f"{_SECOND_HAND}. These runs are not federated: one learner with all rows.",
    {
        "model": ("roberta-base",),
        "clients": ("1",),
        "rank": ("2",),
        "budget": ("10 epochs per block, blocks not found",),
        **dict.fromkeys(("data", "alpha", "optimiser", "rates", "seeds", "evaluation rows"), ()),
    },
    (
        Number(0.770, "RAC-LoRA", GLUE, ("rac-lora",), over=_SOME_FOUR),
        Number(0.785, "LoRA", GLUE, over=_SOME_FOUR),
        Number(0.776, "COLA", GLUE, over=_SOME_FOUR),
    ),
)

_FFA = Paper(
    "FFA-LoRA, arXiv 2403.12313",
    f"{_SECOND_HAND}. From its study of starts of A; the main table was not found.",
    _AT_A_SERVER
    | {
        "model": ("roberta-large",),
        "clients": ("3",),
        "rank": ("8",),
        "alpha": ("16",),
        "partition": ("1 x [0.1, 0.9], 1 x [0.9, 0.1], 1 x [0.5, 0.5]",),
        "budget": ("1000 rounds x 10 steps x 200 rows",),
        "optimiser": ("sgd",),
        **dict.fromkeys(("rates", "seeds", "evaluation rows", "head"), ()),
    },
    (Number(0.9184, "FFA-LoRA, Kaiming start", ("QNLI",), ("ffa-lora",)),),
)

PAPERS: Mapping[str, Paper] = {
    "adf-lora": _ADF,
    "tad-lora": _TAD,
    "rolora": _ROLORA,
    "fedrot-lora": _FEDROT,
    "dec-lora": _DEC,
    "dec-lora-again": _DEC_AGAIN,
    "fedex-lora": _FEDEX,
    "fedsa-lora": _FEDSA,
    "rac-lora": _RAC,
    "ffa-lora": _FFA,
}
"""Figures that are not here were not found, are not of GLUE (LoRA-FAIR, FLoRA, DeCAF), or are of what no run here can
be: other starts of FFA-LoRA's A, a base of 4 bits, FedRot-LoRA's ablations."""
