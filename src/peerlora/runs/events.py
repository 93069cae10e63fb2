"""Typed, versioned events of a run, one JSON line each.

Report, metrics and resume read these and nothing else.  Rounds are counted in two ways, as everywhere in the
project: ``RoundDone.round`` is the index of the round (from 0); all others give the number of finished rounds.
A field with a default may be missing in a line: older runs were written without it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin

from peerlora.errors import RunError

LISTED_CLIENTS = 5000
"""Clients of a run, beyond which the event of a round has no list of them."""
SPREAD = {"least": 0, "lower_quartile": 25, "median": 50, "upper_quartile": 75, "largest": 100}
"""What stands for such a list beside its mean: names of measures, and percentiles."""


@dataclass(frozen=True)
class RunStarted:
    """First event of every run: its settings and clients."""

    version: ClassVar[int] = 1
    time: str
    """ISO 8601, UTC."""
    method: str
    clients: int
    rounds: int
    metric: str
    """Name of the number that ``Evaluated`` carries, e.g. accuracy."""
    higher_is_better: bool
    seed: int
    threads: int
    versions: dict[str, str]
    """Package name -> version."""
    partition: dict[str, Any]
    """Who holds what: ``names`` [label] and ``counts`` [client][label] in rows."""
    topology: dict[str, Any]
    parameters: int
    """Scalars of one client's adapter."""
    warnings: list[str]
    paths: dict[str, str | None] = field(default_factory=dict)
    """Speed paths: null where one is used, else why not."""
    notes: list[str] = field(default_factory=list)
    """Notes about this run: what its method chose, and why; what was measured of the machine."""
    clock: dict[str, Any] | None = None
    """Virtual time: the settings, and every client's speed and bandwidth in bytes per second (null: unlimited)."""
    held: list[int] = field(default_factory=list)
    """The clients whose numbers the other events give, in this order; empty: all.  A real peer holds one."""
    names: dict[str, str] = field(default_factory=dict)
    """Client number -> site, for real peers."""
    deploys: str = "own"
    """Which model becomes a client's PEFT folder: own, or relayed."""
    select: dict[str, Any] | None = None
    """By what a client's best evaluation is found: metric, mode (max, min), rows (common, own), model; None: none."""
    privacy: dict[str, Any] | None = None
    """What is promised to rows or clients: unit, clip, accountant, generator, guarantee, and planned with [client]
    epsilon, delta, releases, noise, rate and rows; None: nothing is."""
    secure_sums: bool = False
    """Whether clients learn the weighted sums of their neighbours' adapters only."""


@dataclass(frozen=True)
class RoundDone:
    """One round is over: local steps and exchange."""

    version: ClassVar[int] = 1
    round: int
    """Index of the round, from 0."""
    loss: list[float]
    """[client] mean training loss of the local steps; NaN for clients that did not train.  Empty in a run of more than
    ``LISTED_CLIENTS`` clients, whose ``measures`` have its mean, least, quartiles and largest over those that trained.
    """
    consensus_A: float
    consensus_B: float
    consensus_product: float
    """Consensus distance of the update B·A itself."""
    cross_term: float
    local_cross_term: float
    rho: float
    """Realised over the rounds so far: sqrt(lambda_max(mean of W^T W - J)), the share of disagreement that stays; NaN
    where W is not doubly stochastic."""
    edges: list[list[int]] | None
    """[link][2] clients that exchanged, each undirected link once, directed ones as [sender, receiver]; None: not
    written down."""
    contacts: int
    """Links used, an undirected one counted once."""
    bytes_per_edge: int
    """Of one directed transfer."""
    bytes_sent: int
    """All directed transfers of this round."""
    seconds_train: float
    seconds_mix: float
    seconds_diagnostics: float
    weak_mismatch: float = math.nan
    """How far the exchange moved the clients' products B·A: mean squared norm; see ``lora.diagnostics``."""
    strong_mismatch: float = math.nan
    """The same of the factors A and B."""
    measures: dict[str, float] = field(default_factory=dict)
    """What the method's exchange measured, averaged over clients, such as truncation_tail; and ``learning_rate``, where
    it changes with the rounds."""
    virtual_seconds: float = math.nan
    """Since the start of the run, at the end of this round, on the virtual clock; NaN without one."""
    absent: list[int] = field(default_factory=list)
    """Clients without part in this synchronous round: late or away."""
    missed: dict[str, str] = field(default_factory=dict)
    """Neighbour -> why its link was not used, for real peers."""
    behind: int | None = None
    """Rounds by which the foremost neighbour present is ahead, for real peers with common rounds; None: not known."""

    @property
    def mean_loss(self) -> float:
        """Over the clients that trained; NaN where nobody did."""
        known = [each for each in self.loss if math.isfinite(each)]
        return sum(known) / len(known) if known else self.measures.get("loss_mean", math.nan)


@dataclass(frozen=True)
class Evaluated:
    """Every client's own model, the averaged model, and where clients relay their deployed ones, on the same rows."""

    version: ClassVar[int] = 1
    round: int
    """Finished rounds; 0 is before training."""
    rows: int
    own: list[float]
    """[client] metric of its own model."""
    averaged: float
    own_loss: list[float]
    averaged_loss: float
    seconds: float
    final: bool
    virtual_seconds: float = math.nan
    """Since the start of the run, on the virtual clock; NaN without one."""
    relayed: list[float] = field(default_factory=list)
    """[client] metric of its relayed average; empty where nothing is relayed."""
    relayed_loss: list[float] = field(default_factory=list)
    relayed_cut: float = math.nan
    """Mean share of the squared norm of the relayed averages' products that the clients' ranks cut off."""
    personal: list[float] = field(default_factory=list)
    """[client] metric of its own model on held-out rows of its own; empty without such rows, NaN for who has none."""
    personal_loss: list[float] = field(default_factory=list)
    personal_relayed: list[float] = field(default_factory=list)
    """[client] the same of its relayed average."""
    personal_relayed_loss: list[float] = field(default_factory=list)
    metrics: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Which scores, in the words of the fields above -> further metric -> [client], of the averaged model [1]."""
    by_name: dict[str, dict[str, float]] = field(default_factory=dict)
    """At the end, of each label or type of entity: how often it is ``true``, F1 of ``own`` (mean of clients) and of
    ``averaged``; empty for tasks without these."""
    best_rounds: list[int] = field(default_factory=list)
    """[client] finished rounds at its best evaluation so far; empty where none is kept."""
    best: list[float] = field(default_factory=list)
    """[client] the value by which that one is its best."""
    stopped: list[int] = field(default_factory=list)
    """Clients that train no more, since their evaluations had not become better."""
    privacy: dict[str, list[float]] = field(default_factory=dict)
    """[client] epsilon, NaN where it has no bound, and releases spent so far; empty without privacy."""


@dataclass(frozen=True)
class Generated:
    """What models of a run of chats answered to some evaluation rows."""

    version: ClassVar[int] = 1
    round: int
    """Finished rounds."""
    client: int
    """Whose own model answered."""
    answers: list[dict[str, str]]
    """By row: prompt, expected, own, and averaged where the averaged model is known."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """own, averaged -> name of a score -> its mean over these rows."""
    cut: int = 0
    """Evaluation rows that were not asked, since their answer was cut at data.max_length."""


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was saved, from which the run can resume."""

    version: ClassVar[int] = 1
    round: int
    """Finished rounds."""
    file: str
    """Relative to the run folder."""
    sha256: str


@dataclass(frozen=True)
class Resumed:
    """The run was resumed after ``round`` finished rounds."""

    version: ClassVar[int] = 1
    time: str
    round: int


@dataclass(frozen=True)
class Warned:
    """Something the user should know."""

    version: ClassVar[int] = 1
    message: str


@dataclass(frozen=True)
class Joined:
    """A real peer finished its handshakes and begins its rounds."""

    version: ClassVar[int] = 1
    time: str
    round: int
    """Finished rounds."""
    reached: list[int]
    """The neighbours that were there."""


@dataclass(frozen=True)
class NeighbourChanged:
    """Something happened between a real peer and a neighbour."""

    version: ClassVar[int] = 1
    time: str
    """ISO 8601, UTC: when it was noticed."""
    round: int
    """Finished rounds when it was written down."""
    client: int
    """The neighbour."""
    kind: str
    """up, suspect, down, refused, or half-used: one end of the link used an exchange that the other did not."""
    detail: str


@dataclass(frozen=True)
class CaughtUp:
    """A real peer that had fallen behind left out rounds."""

    version: ClassVar[int] = 1
    time: str
    round: int
    """Finished rounds before."""
    to: int
    """Finished rounds from here on."""
    client: int
    """The neighbour that was followed."""
    pulled: bool
    """Whether its state was taken over."""


@dataclass(frozen=True)
class PolicyShown:
    """What a flow policy does, for the figures of a report: the averaged one, or that of the client held here."""

    version: ClassVar[int] = 1
    round: int
    """Finished rounds."""
    model: str
    """Whose policy: averaged, or own."""
    fields: list[list[list[float]]] = field(default_factory=list)
    """Of the point mass at rest: [block][place] of x, y and the mean move of an action by that block in x and y."""
    shown: str = ""
    """What ``traces`` are of."""
    traces: dict[str, list[float]] = field(default_factory=dict)
    """Client -> [step] of the first evaluated episode in its environment."""


@dataclass(frozen=True)
class RunFinished:
    """Last event of a run that reached its end."""

    version: ClassVar[int] = 1
    time: str
    summary: dict[str, Any]


Event = (
    RunStarted
    | RoundDone
    | Evaluated
    | Generated
    | CheckpointSaved
    | Resumed
    | Warned
    | Joined
    | NeighbourChanged
    | CaughtUp
    | PolicyShown
    | RunFinished
)

_TYPES: dict[str, Any] = {kind.__name__: kind for kind in get_args(Event)}


def to_json(event: Event) -> str:
    """One line without a newline; NaN and infinities become null, numpy and torch values plain numbers."""
    body = {field.name: getattr(event, field.name) for field in fields(event)}
    tree = {"type": type(event).__name__, "version": event.version, **plain(body)}
    return json.dumps(tree, allow_nan=False, separators=(",", ":"))


def from_json(line: str) -> Event:
    """The event of one line; null where a float is due is read as NaN.

    Raises RunError for a line that is not an event, or one of an unknown type or version.
    """
    try:
        tree = json.loads(line)
        name, version = tree.pop("type"), tree.pop("version")
        kind = _TYPES.get(name)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise RunError(f"{line[:80]!r} is not an event; expected a JSON object with type and version") from None
    if kind is None or version != kind.version:
        known = ", ".join(f"{key} {each.version}" for key, each in _TYPES.items())
        raise RunError(
            f"event {name} {version} is unknown here ({known}); read this run with the version that wrote it"
        )
    types = {each.name: each.type for each in fields(kind)}
    needed = {each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING}
    if needed - set(tree) or set(tree) - set(types):
        wrong = ", ".join(sorted((needed - set(tree)) | (set(tree) - set(types))))
        raise RunError(f"event {name} {version} has missing or unknown fields: {wrong}; the event log is damaged")
    wrong = [key for key, value in tree.items() if not _fits(types[key], value)]
    if wrong:
        raise RunError(f"event {name} {version} has values of a wrong type: {', '.join(wrong)}; the log is damaged")
    return kind(**{key: _typed(types[key], value) for key, value in tree.items()})


def contradiction(event: Event, start: RunStarted | None) -> str:
    """What of an event cannot be in a run that began with ``start``, or an empty string."""
    if isinstance(event, RunStarted):
        counts = event.partition.get("counts") if not event.held else None
        return "counts of other clients than there are" if counts and len(counts) != event.clients else ""
    if start is None or not isinstance(event, RoundDone | Evaluated):
        return ""
    if not 0 <= event.round < start.rounds + isinstance(event, Evaluated):
        return f"{type(event).__name__} of round {event.round}, in a run of {start.rounds}"
    clients = len(start.held) or start.clients
    lists = [event.loss] if isinstance(event, RoundDone) else [event.own, event.own_loss]
    lists = [] if lists == [[]] and clients > LISTED_CLIENTS else lists
    if isinstance(event, Evaluated):
        if event.relayed or event.relayed_loss:
            lists += [event.relayed, event.relayed_loss]
        further = [values for of, named in event.metrics.items() if of != "averaged" for values in named.values()]
        later = [event.personal, event.personal_loss, event.personal_relayed, event.personal_relayed_loss, *further]
        later += event.privacy.values()
        lists += [values for values in [*later, event.best, event.best_rounds] if values]
    if any(len(values) != clients for values in lists):
        found = next(len(values) for values in lists if len(values) != clients)
        return f"{type(event).__name__} of {found} clients, in a run of {clients}"
    edges = (event.edges or []) if isinstance(event, RoundDone) else []
    if not all(len(edge) == 2 and all(0 <= client < start.clients for client in edge) for edge in edges):
        return f"a link of a client that is none of {start.clients}"
    return ""


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: mappings, lists, numbers, strings; floats that are not finite become None."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):  # numpy and torch, arrays and scalars alike
        return plain(value.tolist())
    return value


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value read from JSON is of a field's type; where a float is due, null is one."""
    inner = get_args(kind)
    if kind is Any:
        return True
    if get_origin(kind) is UnionType:
        return any(_fits(each, value) for each in inner)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(inner[0], each) for each in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(inner[1], each) for each in value.values())
    if kind is float and (value is None or isinstance(value, int)):
        return not isinstance(value, bool)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def _typed(kind: Any, value: Any) -> Any:
    if kind is float:
        return math.nan if value is None else float(value)
    if get_origin(kind) is list:
        return [_typed(get_args(kind)[0], each) for each in value]
    if get_origin(kind) is dict:
        return {key: _typed(get_args(kind)[1], each) for key, each in value.items()}
    return value
