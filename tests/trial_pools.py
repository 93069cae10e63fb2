"""Pools of workers for the trials of a comparison, without Ray."""

from types import SimpleNamespace

from peerlora.config.cluster import ClusterConfig
from peerlora.experiments import trial_pool
from peerlora.experiments.trial_pool import TrialPool
from peerlora.experiments.trial_worker import TrialWorker
from peerlora.runtime.cluster.worker import describe_process


class Failed(Exception):
    """As Ray's errors: of a task, or of a worker that is gone."""

    cause = None


class PoolRay:
    """As much of Ray as a pool uses, on machines of one core of which each may leave; an answer comes at the next look.

    ``leave``: trial -> how many machines there are from its first begin on.  ``long``: trials whose workers answer only
    when they are asked to stop, with a checkpoint; ``deaf``: those that go on then, too.  ``torch``: of the machines on
    which workers start from now on, in place of ours.
    """

    exceptions = SimpleNamespace(RayTaskError=type("RayTaskError", (Failed,), {}), RayError=Failed)

    def __init__(self, machines, leave):
        self.machines, self.leave, self.actors, self.most = machines, leave, [], 0
        self.long, self.deaf, self.jobs = set(), set(), []
        self.torch = None

    def options(self, **resources):
        return SimpleNamespace(remote=self.actor)

    def actor(self, *arguments):
        made = SimpleNamespace(alive=True, asked=False)
        made.facts = describe_process()
        made.facts["versions"] |= {"torch": self.torch} if self.torch else {}
        made.describe = SimpleNamespace(remote=lambda: (made, made.facts))
        made.run = SimpleNamespace(remote=lambda job, key, rows: self.begin(made, job))
        made.ask_stop = SimpleNamespace(remote=lambda: setattr(made, "asked", True))
        self.actors.append(made)
        self.most = max(self.most, self.living)
        assert self.living <= self.machines, "a worker would wait for a core"
        return made

    @property
    def living(self):
        return sum(each.alive for each in self.actors)

    def begin(self, actor, job):
        self.machines = self.leave.pop(job.run.name, self.machines)
        for each in [each for each in self.actors if each.alive][self.machines :]:
            each.alive = False
        self.jobs.append(job)
        name = job.run.name
        return actor, {"run.json": b"{}"} if name in self.long | self.deaf else {"summary.json": b"{}"}, name

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 1.0}}] * self.machines

    def put(self, rows):
        return rows

    def wait(self, answers, num_returns=1, timeout=0):
        assert answers, "Ray refuses to wait for nothing"
        ready = [each for each in answers if self.is_ready(*each)]
        return ready, [each for each in answers if each not in ready]

    def is_ready(self, actor, value, name=""):
        return not actor.alive or name not in self.deaf and (name not in self.long or actor.asked)

    def get(self, answer, timeout):
        if not answer[0].alive:
            raise self.exceptions.RayError("gone")
        return answer[1]

    def kill(self, actor, no_restart):
        actor.alive = False


class ComputingRay(PoolRay):
    """Its workers run their trials, when their answers are fetched; until they are asked to stop they have none."""

    def actor(self, *arguments):
        made, worker = super().actor(*arguments), TrialWorker(*arguments)
        made.run = SimpleNamespace(remote=lambda job, key, rows: (made, lambda: worker.run(job, key, rows), "any"))
        ask, made.ask_stop = made.ask_stop, SimpleNamespace(remote=lambda: (ask.remote(), worker.ask_stop()))
        return made

    def get(self, answer, timeout):
        found = super().get(answer, timeout)
        return found() if callable(found) else found


def build_pool(monkeypatch, machines, workers=2, leave=None, **settings):
    """A pool on the double: Ray, the pool, and what it warns of."""
    ray, warned = PoolRay(machines, leave or {}), []
    monkeypatch.setattr(trial_pool, "actor_class", lambda: ray)
    monkeypatch.setattr(trial_pool, "data_key", lambda config: "rows")
    cache = SimpleNamespace(share_prefix=False, resources=lambda config: None)
    return ray, TrialPool(ray, ClusterConfig(workers=workers, retries=9, **settings), cache, warned.append), warned


def trials(count, **settings):
    config = SimpleNamespace(**{"device": "cpu", "threads": 1, **settings})
    return [SimpleNamespace(name=f"cell {i}", folder=f"cell-{i}", config=config) for i in range(count)]


def finished(pool, these, folder):
    return sorted(trial.name for trial in pool.run(these, folder, lambda trial: None, lambda: False))
