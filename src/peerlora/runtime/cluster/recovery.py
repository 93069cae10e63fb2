"""What follows when workers are lost: new ones, as often as the settings say and where machines come in time."""

from __future__ import annotations

from collections.abc import Callable

from peerlora.config.cluster import ClusterConfig
from peerlora.errors import ClusterError, RunError, WorkersLost
from peerlora.runtime.cluster.group import Engine


class Recovery:
    """Counts the losses of one command, from its first workers on."""

    def __init__(self, machines: Engine, settings: ClusterConfig):
        self.machines, self.settings, self.left = machines, settings, settings.retries

    def await_workers(self, lost: WorkersLost, then: Callable[[], str], tell: Callable[[str], None]) -> None:
        """Return when new workers can be started in place of ``lost`` ones; ``tell`` is told where that takes a while.

        Raises RunError where no retry is left, or machines do not come in time, which says what to do by ``then``.
        """
        if self.left == 0:
            raise RunError(f"{lost}; {then()}") from None
        self.left -= 1
        try:
            self.machines.await_machines(self.settings, tell)
        except ClusterError as error:
            raise RunError(f"{error}, and {then()}") from None
