"""The Trainer: its sinks, what an opening costs, and the names in a checkpoint, which run folders depend on."""

from peerlora.runs.events import Evaluated, RoundDone, RunFinished, RunStarted
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.participation import AllClients
from peerlora.runtime.simulate import simulate

QUICK = ["train.rounds=2", "train.local_steps=1", "eval.every=2", "checkpoint.every=1", "topology=ring"]


def test_sinks_take_every_event_in_their_order_and_the_store_comes_first(config, tmp_path):
    taken = []

    def sink(name):
        def take(event):
            logged = select_events(read_events(tmp_path / "run"), type(event))[-1]
            taken.append((name, event, str(logged) == str(event)))

        return take

    simulate(config("bert", *QUICK), tmp_path / "run", sinks=[sink("one"), sink("two")], report=False)
    assert all(logged for *_, logged in taken), "an event reached a sink before the run folder"
    assert [name for name, *_ in taken] == ["one", "two"] * (len(taken) // 2)
    kinds = [type(event) for name, event, _ in taken if name == "one" and type(event).__name__ != "Warned"]
    assert kinds == [RunStarted, Evaluated, RoundDone, RoundDone, Evaluated, RunFinished]
    assert (tmp_path / "run" / "summary.json").is_file() and not (tmp_path / "run" / "report.html").exists()


def test_the_gossip_before_round_0_counts_in_round_0_only(config, tmp_path):
    plain, pooled = (
        select_events(
            read_events(simulate(config("bert", *QUICK, *words), tmp_path / name, report=False).run), RoundDone
        )
        for name, words in (("plain", []), ("pooled", ["train.label_prior=pooled"]))
    )
    federation = compose(config("bert", *QUICK, "train.label_prior=pooled"))
    opening = AllClients(federation).start().bytes_sent
    assert opening > 0 and pooled[0].bytes_sent == plain[0].bytes_sent + opening
    assert pooled[1].bytes_sent == plain[1].bytes_sent


def test_a_checkpoint_keeps_its_names(config, tmp_path):
    """Older run folders are resumed by these names."""
    from safetensors import safe_open

    found = {}
    for name, words in {
        "plain": ["algorithm.name=dec-lora"],
        "codec": ["algorithm.name=dec-lora", "exchange.codec=top-k", "train.optimizer_state=keep"],
        "clock": ["algorithm.name=dec-lora", "clock.speed=1"],
        "asynchronous": ["algorithm.name=aedfl"],
    }.items():
        run = simulate(config("bert", *QUICK, *words), tmp_path / name, report=False).run
        with safe_open(run / "checkpoints" / "round-000002.safetensors", "pt") as file:
            found[name] = {key for key in file.keys() if not key.startswith("rounds.post.message.")}
    assert found["plain"] == {"state..flat", "state..ranks", "moment"}
    assert found["codec"] == {
        *found["plain"],
        "exchange.xhat",
        "exchange.s",
        *(k for k in found["codec"] if "learner" in k),
    }
    assert any(key.startswith("learner.") for key in found["codec"])
    assert found["clock"] == {*found["plain"], "rounds.step_seconds"}
    rounds = {"start", "result", "losses", "post.known", "post.known then"}
    assert {f"rounds.{name}" for name in rounds} <= found["asynchronous"]
