"""What every section of a config is made of."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator

from peerlora.plugins import Kind, Registry

Positive = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=1, le=16_384)]  # more than the width of any layer
Batch = Annotated[int, Field(ge=1, le=100_000)]  # rows; a batch goes round a smaller shard, and must fit into memory
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]  # of dropout, of links and clients that fail


class Section(BaseModel):
    """One part of the config: immutable, closed to unknown keys, each setting described by the string below it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def plugin_kinds(registry: Registry) -> WrapValidator:
    """Let the kinds that other packages have registered be validated by their own sections."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
        plugin = registry.find(kind) if isinstance(kind, str) else None
        return handler(value) if plugin is None else plugin.settings.model_validate(value)

    return WrapValidator(validate)


Builder = TypeVar("Builder", bound=Callable[..., Any])


def kind_decorator(registry: Registry, name: str, settings: type[Section]) -> Callable[[Builder], Builder]:
    """A decorator that registers a function as the builder of a kind."""

    def register(build: Builder) -> Builder:
        registry.register(name, Kind(settings, build), build.__module__)
        return build

    return register
