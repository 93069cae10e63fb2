"""Methods, topologies, tasks and partitions of other packages, found by entry point or registered by a decorator.

A package names them in the entry-point groups below; they are looked for late, when a name is unknown or all are
listed, and imported when they are used.  A script registers its own with a decorator, such as ``register_method``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerlora.errors import ConfigError, first_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Kind:
    """A kind of topology or partition: the config section with its settings, and the function that builds it."""

    settings: type[Any]
    """A ``Section`` with the field ``kind: Literal["name"]``."""
    build: Callable[..., Any]


@dataclass(frozen=True)
class Plugin:
    """One registered name."""

    source: str
    """Where it comes from, for people: a package with its version, or a script."""
    package: str
    """The top-level package of its module; what one package registers twice is no clash."""
    load: Callable[[], Any]


class Registry:
    """The names of one group, those of this package and of others."""

    def __init__(self, group: str, noun: str, home: str | None = None):
        self.group, self.noun, self.home = group, noun, home
        """``home``: the module that reserves this package's names; imported before other packages are looked at."""
        self._plugins: dict[str, Plugin] = {}
        self._flaw: Callable[[str, Any], str | None] = lambda name, thing: None
        self._scanned = False

    def reserve(self, own: Mapping[str, Any] | Iterable[str], flaw: Callable[[str, Any], str | None]) -> None:
        """Take this package's own names; ``flaw`` says what is wrong with a thing of another package, or None."""
        things = own if isinstance(own, Mapping) else dict.fromkeys(own)
        self._plugins |= {name: Plugin(_PACKAGE, _PACKAGE, partial(_itself, thing)) for name, thing in things.items()}
        self._flaw = flaw

    def register(self, name: str, thing: Any, module: str) -> None:
        """Add a thing of a running script or an imported module.

        Raises ConfigError where the name is taken, or the thing cannot be used.
        """
        source = f"module {module}"
        if module == "__main__":
            source = f"script {Path(getattr(sys.modules[module], '__file__', None) or 'stdin').name}"
        self._check(name, thing, source)
        self._scan()
        self._add(name, Plugin(source, module.partition(".")[0], partial(_itself, thing)))

    def find(self, name: str) -> Any | None:
        """The thing of this name, imported if need be; None for an unknown name.

        Raises ConfigError for a thing that cannot be imported or used, and for names that two packages have.
        """
        plugin = self._found(name)
        if plugin is None:
            return None
        thing = self._loaded(name, plugin)
        if plugin.package != _PACKAGE:
            self._check(name, thing, plugin.source)
        return thing

    def source(self, name: str) -> str:
        """Where a known name comes from, for people."""
        plugin = self._found(name)
        assert plugin is not None, name
        return plugin.source

    def names(self) -> list[str]:
        """The names that other packages and scripts have registered, in order."""
        self._scan()
        return sorted(name for name, plugin in self._plugins.items() if plugin.package != _PACKAGE)

    def _found(self, name: str) -> Plugin | None:
        if name not in self._plugins and self.home is not None:
            import_module(self.home)
        if name not in self._plugins:
            self._scan()
        return self._plugins.get(name)

    def _scan(self) -> None:
        """Read the entry points of all installed packages; nothing of them is imported yet."""
        if self._scanned:
            return
        from importlib.metadata import entry_points

        for entry in entry_points(group=self.group):
            self._add(entry.name, Plugin(_owner(entry), entry.module.partition(".")[0], entry.load))
        self._scanned = True

    def _add(self, name: str, plugin: Plugin) -> None:
        other = self._plugins.get(name)
        if other is not None and other.package != plugin.package:
            raise ConfigError(
                f"{self.noun} {name!r} is registered twice, by {other.source} and by {plugin.source}; rename one of "
                "them, or uninstall its package"
            )
        self._plugins[name] = plugin

    def _loaded(self, name: str, plugin: Plugin) -> Any:
        try:
            return plugin.load()
        except Exception as error:  # a module of others runs, which may fail in any way
            raise ConfigError(
                f"{self.noun} {name!r} of {plugin.source} cannot be loaded ({first_line(error)}); "
                "install another version of that package, or uninstall it"
            ) from error

    def _check(self, name: str, thing: Any, source: str) -> None:
        if flaw := self._flaw(name, thing):
            raise ConfigError(f"{self.noun} {name!r} of {source} cannot be used: {flaw}")


def kind_flaw(name: str, thing: Any, base: type[Any]) -> str | None:
    """What is wrong with a plug-in's ``Kind``; its settings must derive from ``base``."""
    if not isinstance(thing, Kind):
        return f"{thing!r} given; expected a peerlora.plugins.Kind with its settings and its function"
    if not (isinstance(thing.settings, type) and issubclass(thing.settings, base)):
        return f"its settings are {thing.settings!r}; expected a subclass of {base.__module__}.{base.__name__}"
    field = thing.settings.model_fields.get("kind")
    if field is None or name not in getattr(field.annotation, "__args__", ()):
        return f"{thing.settings.__name__} has no field `kind: Literal[{name!r}]`"
    return None


def _itself(thing: Any) -> Any:
    return thing


def _owner(entry: EntryPoint) -> str:
    return f"package {entry.dist.name} {entry.dist.version}" if entry.dist else f"module {entry.module}"


METHODS = Registry("peerlora.methods", "method", home="peerlora.algorithms")
TOPOLOGIES = Registry("peerlora.topologies", "topology")
PARTITIONS = Registry("peerlora.partitions", "partition")
TASKS = Registry("peerlora.tasks", "task")
