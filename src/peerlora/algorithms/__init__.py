"""One file per method, and the registry that finds it by name, also in other packages and scripts."""

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from math import isfinite
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from peerlora.algorithms.ad_psgd import ADPSGD
from peerlora.algorithms.adf_lora import ADFLoRA
from peerlora.algorithms.aedfl import AEDFL
from peerlora.algorithms.base import Algorithm, Method, is_asynchronous
from peerlora.algorithms.cached_dfl import CachedDFL
from peerlora.algorithms.choco import Choco
from peerlora.algorithms.consensus_admm import ConsensusADMM
from peerlora.algorithms.d2 import D2
from peerlora.algorithms.dec_lora import DecLoRA
from peerlora.algorithms.decaf import DeCAF
from peerlora.algorithms.dfedavg import DSGD, DFedAvg, DFedAvgM, DFedSAM, FedProx
from peerlora.algorithms.fedex_lora import FedExLoRA
from peerlora.algorithms.fedhl import FedHL
from peerlora.algorithms.fedit import FedIT
from peerlora.algorithms.fedrot_lora import FedRotLoRA
from peerlora.algorithms.fedsa_lora import FedSALoRA
from peerlora.algorithms.fedspeed import DFedADMM, DFedADMMSAM, FedSpeed
from peerlora.algorithms.ffa_lora import FFALoRA
from peerlora.algorithms.flexlora import FlexLoRA
from peerlora.algorithms.flood import FLood
from peerlora.algorithms.flora import FLoRA
from peerlora.algorithms.hetlora import HetLoRA
from peerlora.algorithms.k_gt import KGT
from peerlora.algorithms.local import Local
from peerlora.algorithms.lora_fair import LoRAFAIR
from peerlora.algorithms.noloco import NoLoCo
from peerlora.algorithms.push_sum import SGP, PushDIGing
from peerlora.algorithms.qg_adam import QGAdam
from peerlora.algorithms.qg_dsgdm import QGDSGDm
from peerlora.algorithms.rac_lora import RACLoRA
from peerlora.algorithms.rolora import RoLoRA
from peerlora.algorithms.salf import SALF
from peerlora.algorithms.swfp import SWFP
from peerlora.algorithms.tad_lora import TADLoRA
from peerlora.algorithms.traits import Traits
from peerlora.errors import ConfigError, nearest
from peerlora.plugins import METHODS

REGISTRY: dict[str, type[Any]] = {  # frozen dataclasses that satisfy Algorithm or AsynchronousAlgorithm
    "local": Local,
    "dec-lora": DecLoRA,
    "adf-lora": ADFLoRA,
    "tad-lora": TADLoRA,
    "rolora": RoLoRA,
    "ffa-lora": FFALoRA,
    "fedit": FedIT,
    "fedsa-lora": FedSALoRA,
    "decaf": DeCAF,
    "flexlora": FlexLoRA,
    "hetlora": HetLoRA,
    "fedrot-lora": FedRotLoRA,
    "lora-fair": LoRAFAIR,
    "rac-lora": RACLoRA,
    "flora": FLoRA,
    "fedex-lora": FedExLoRA,
    "fedhl": FedHL,
    "dsgd": DSGD,
    "dfedavg": DFedAvg,
    "dfedavgm": DFedAvgM,
    "dfedsam": DFedSAM,
    "fedprox": FedProx,
    "fedspeed": FedSpeed,
    "dfedadmm": DFedADMM,
    "dfedadmm-sam": DFedADMMSAM,
    "k-gt": KGT,
    "d2": D2,
    "consensus-admm": ConsensusADMM,
    "qg-dsgdm": QGDSGDm,
    "qg-adam": QGAdam,
    "noloco": NoLoCo,
    "cached-dfl": CachedDFL,
    "sgp": SGP,
    "push-diging": PushDIGing,
    "choco": Choco,
    "salf": SALF,
    "flood": FLood,
    "swfp": SWFP,
    "aedfl": AEDFL,
    "ad-psgd": ADPSGD,
}

ALIASES = {"dlora": "dec-lora", "conlora": "ffa-lora", "dlora-fa": "ffa-lora"}
ALIASES |= {"feddyn": "dfedadmm", "scaffold": "k-gt", "d-psgd": "dsgd", "exact-diffusion": "d2"}
ALIASES |= {"push-sum": "sgp"}
"""Other papers' names for the same arithmetic."""


Kind = TypeVar("Kind", bound=type[Any])


def register_method(name: str) -> Callable[[Kind], Kind]:
    """Make a method of your own known under a name, as a decorator of its class.

    Raises ConfigError where another package has the name, or the class is no method.
    """

    def register(kind: Kind) -> Kind:
        METHODS.register(name, kind, kind.__module__)
        return kind

    return register


def find_method(name: str) -> type[Any] | None:
    """The class of a method by its name or an alias, of this package or of another one; None for an unknown name."""
    return METHODS.find(name)


def method_class(name: str) -> type[Any]:
    """The class of a method by its name or an alias; raises ConfigError for an unknown name."""
    kind = find_method(name)
    if kind is None:
        names = [*REGISTRY, *ALIASES, *METHODS.names()]
        raise ConfigError(
            f"algorithm.name {name!r} is unknown{nearest(name, names)}; expected one of {', '.join(names)}"
        )
    return kind


def build_algorithm(name: str, parameters: dict[str, Any]) -> Algorithm[Any]:
    """The method registered under ``name`` or an alias of it, with its hyper-parameters checked."""
    kind = method_class(name)
    known = {field.name: field for field in fields(kind)}
    for key in parameters:
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "has no settings"
            raise ConfigError(f"unknown key 'algorithm.{key}'{nearest(key, known)}; {name} {takes}")
    hints = get_type_hints(kind)
    return kind(**{key: _setting(key, value, hints[key], known[key].default) for key, value in parameters.items()})


def _setting(key: str, value: Any, hint: Any, default: Any) -> Any:
    """One setting's value as its annotation asks; a whole number serves as a float."""
    if not _fits(value, hint):
        example = f", such as {default}" if type(default) in (int, float) else ""
        raise ConfigError(f"algorithm.{key}: {value!r} given; expected {_in_words(hint)}{example}")
    return float(value) if type(value) is int and float in (hint, *get_args(hint)) else value


def _in_words(hint: Any) -> str:
    """What an annotation asks for, as people and YAML say it."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}
    return words.get(hint) or str(getattr(hint, "__name__", hint))


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return type(value) in (int, float) and isfinite(value)
    return type(value) is hint


def describe_algorithms() -> dict[str, dict[str, Any]]:
    """For each registered name: aliases, source, trains, mixes, operator, requires, settings with their defaults, its
    own defaults of ``train``, the package that it comes from.

    ``asynchronous``: its clients keep no common step.
    ``not_with``: by what a config may ask for, why it does not go with it.
    """
    described = {}
    for name in [*REGISTRY, *METHODS.names()]:
        kind = method_class(name)
        traits: Traits = kind.traits
        described[name] = {
            "aliases": [alias for alias, meant in ALIASES.items() if meant == name],
            "source": traits.source,
            "trains": traits.trains,
            "mixes": traits.mixes,
            "operator": traits.operator,
            "requires": ", ".join(traits.required()),
            "unequal_ranks": traits.unequal_ranks is None,
            "not_with": traits.not_with(),
            "asynchronous": is_asynchronous(kind),
            "settings": {field.name: field.default for field in fields(kind)},
            "train": dict(traits.train_defaults),
            "package": METHODS.source(name).removeprefix("package "),
        }
    return described


def _flaw(name: str, kind: Any) -> str | None:
    """Why a class of another package is no method; None for a method."""
    if not (isinstance(kind, type) and is_dataclass(kind) and Method in kind.__mro__):
        return f"{kind!r} given; expected a dataclass that derives from peerlora.algorithms.base.Method, see its file"
    if not isinstance(vars(kind).get("traits"), Traits):
        return f"{kind.__name__} declares no traits of its own; add `traits: ClassVar = Traits(source=...)`"
    lacking = [each.name for each in fields(kind) if each.default is MISSING]
    return f"{', '.join(lacking)} of {kind.__name__} has no default; give every setting one" if lacking else None


METHODS.reserve(REGISTRY | {alias: REGISTRY[name] for alias, name in ALIASES.items()}, _flaw)
