"""Every error that peerlora raises on purpose.

PeerloraError                 something the user can mend; the command line prints it and exits with code 2, or with 1
                              where the same command may get further a little later
├── ConfigError               a setting is unknown, out of range or contradicts another
├── ModelError                a base model or PEFT adapter cannot be loaded, or has no matching layers
├── DataError                 a file, column or label is missing or unusable
├── TopologyError             a graph cannot be built, or would never let all clients agree
├── CompositionError          parts that are fine alone do not work together (method, topology, adapter)
├── RunError                  a run folder is in use, belongs to another config, or is damaged; NotNow: the others are
│                             not ready for this run yet; TooManyFiles: the process may open no more just now
├── ClusterError              a cluster or its machines are not there, or not as they must be
├── DivergenceError           a loss stopped being finite
├── IdentityError             a key, certificate or member list is missing, unsafe, expired or not signed as it must be
├── TransportError            a message did not reach a peer: Refused, PeerDown, DeadlineMissed (network/base.py)
├── ExtraMissing              an optional part of peerlora is not installed
└── Stopped                   not an error: a run was asked to stop and saved a checkpoint; exit code 130

A message says what was given, what was expected, and what to do:
``ring of 2 clients has a double edge; use at least 3 clients or topology.kind=complete``
"""

from collections.abc import Iterable
from difflib import get_close_matches


class PeerloraError(Exception):
    """Base of all errors that a user can mend."""

    exit_code = 2


class ConfigError(PeerloraError):
    """Raised while a config is read: unknown key, wrong type, value out of range."""


class ModelError(PeerloraError):
    """Raised while a base model or a PEFT adapter is loaded or changed."""


class DataError(PeerloraError):
    """Raised while data are read, tokenised or divided among clients."""


class TopologyError(PeerloraError):
    """Raised while a graph or its weights are built."""


class CompositionError(PeerloraError):
    """Raised when a run is composed of parts that cannot work together."""


class RunError(PeerloraError):
    """Raised for run folders: in use, of another config, damaged."""


class NotNow(RunError):
    """Raised where only the other sites' progress stands in the way; trying again later helps."""

    exit_code = 1


class TooManyFiles(NotNow):
    """Raised where this process may open no more files; a moment later it may."""


class WorkersLost(RunError):
    """Raised where workers of a cluster died or did not answer in time; new ones can go on."""

    exit_code = 1


class QuorumMissed(RunError):
    """Raised after a real peer's run that had contact in too few of its rounds; its result is written."""

    exit_code = 1


class ClusterError(PeerloraError):
    """Raised for clusters: no answer, too few resources, other versions."""


class DivergenceError(PeerloraError):
    """Raised when a client's loss is not finite; says which client, round and step."""


class IdentityError(PeerloraError):
    """Raised for keys, certificates and member lists: missing, unsafe, expired, not signed as they must be."""


class ExtraMissing(PeerloraError):
    """Raised when a command needs an optional part of peerlora that is not installed."""


class Stopped(PeerloraError):
    """Raised when a run was asked to stop; it saved a checkpoint first."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known word closest to ``word``, or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """What another library's error says first, with its class where that alone tells little."""
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
