from dataclasses import replace

import numpy as np
import pytest
import torch

from cases import others_slow
from peerlora.data.batches import collate
from peerlora.errors import DivergenceError
from peerlora.lora.adapters import Adapters
from peerlora.lora.attach import with_decoder_inputs
from peerlora.runtime.compose import compose
from peerlora.train import learner as learner_module
from peerlora.train.base import LocalPlan
from peerlora.train.local_rules import Masked

CAUSAL = ("task.kind=causal-lm", "data.label=null")


def noisy(x, size=0.1, seed=3):
    """Every client's own values in every block."""
    generator = torch.Generator().manual_seed(seed)
    return replace(x, flat=x.flat + size * torch.randn(x.flat.shape, generator=generator, dtype=torch.float64))


def run(learner, x, schedule, first=0):
    for t, train in enumerate(schedule, start=first):
        with learner.round(t):
            x = learner.fit(x, train)
    return x


def loss_of(federation, x, client, rows):
    """The training loss of one client's row, through the model but not through the Learner."""
    batch = collate(federation.train_data, [rows], 0, torch.float64)
    if batch.written is not None:
        batch = replace(batch, inputs=with_decoder_inputs(federation.model.base, batch.inputs, batch.targets))
    federation.model.bind_adapters(x)
    return federation.learner.task.losses(federation.model(batch.inputs), batch)[0]


# --- when the optimiser's memory is kept


def torch_optimizer(train, parameter):
    if train.optimizer == "adamw":
        return torch.optim.AdamW([parameter], lr=train.lr, weight_decay=train.weight_decay)
    return torch.optim.SGD([parameter], lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)


def train_plainly(config, schedule):
    """The same training with one torch optimiser per client and block, made anew when the setting says so."""
    federation = compose(config)
    x, finished = federation.start, []
    for i in range(config.clients):
        parameters = {b: torch.nn.Parameter(x.select(b).flat[i : i + 1].clone()) for b in ("A", "B", "head")}
        optimizers, last = {}, None
        for t, train in enumerate(schedule):
            active = (*train, "head")
            kept = config.train.optimizer_state
            if not optimizers or kept == "round" or (kept == "phase" and active != last):
                optimizers = {b: torch_optimizer(config.train, parameter) for b, parameter in parameters.items()}
            last = active
            for rows in federation.learner.shards.rows(i, t, config.train.local_steps):
                own = Adapters(x.spec, torch.cat(list(parameters.values()), 1), x.ranks[i : i + 1])
                loss = loss_of(federation, own, i, rows)
                found = torch.autograd.grad(loss, [parameters[b] for b in active])
                for b, gradient in zip(active, found, strict=True):
                    parameters[b].grad = gradient
                    optimizers[b].step()
        finished.append(torch.cat(list(parameters.values()), 1).detach())
    return torch.cat(finished)


OPTIMIZERS = {
    "adamw": ["train.optimizer=adamw", "train.weight_decay=0.1"],
    "sgd": ["train.optimizer=sgd", "train.momentum=0.9", "train.lr=0.5"],
}
SCHEDULE = ["B", "B", "A", "A", "B"]


@pytest.mark.parametrize("kept", others_slow(["round", "phase", "keep"], ["phase"]))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_state_is_as_with_torch_optimisers_kept_or_made_anew(config, optimizer, kept):
    chosen = config("bert", "clients=2", "topology.kind=path", *OPTIMIZERS[optimizer], f"train.optimizer_state={kept}")
    federation = compose(chosen)
    found = run(federation.learner, federation.start, SCHEDULE).flat
    assert (found - train_plainly(chosen, SCHEDULE)).abs().max() < 1e-9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_three_settings_differ(config, optimizer):
    found = []
    for kept in ("round", "phase", "keep"):
        federation = compose(config("bert", *OPTIMIZERS[optimizer], f"train.optimizer_state={kept}"))
        found.append(run(federation.learner, federation.start, SCHEDULE).flat)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert (found[i] - found[j]).abs().max() > 1e-6


@pytest.mark.parametrize("kept", others_slow(["phase", "keep"], ["keep"]))
@pytest.mark.parametrize("rounds", [1, 2, 3])  # within a phase, at a switch, after it
def test_a_loaded_state_goes_on_bit_for_bit(config, kept, rounds):
    chosen = config("bert", f"train.optimizer_state={kept}", "train.weight_decay=0.1", "train.block=3")
    first, second = compose(chosen), compose(chosen)
    x = run(first.learner, first.start, SCHEDULE[:rounds])
    saved = {name: value.clone() for name, value in first.learner.state_dict().items()}
    assert all(len(value) == 4 for value in saved.values()), "every leaf has the leading client axis"
    trained = first.learner.trained
    undisturbed = run(first.learner, x, SCHEDULE[rounds:], rounds)
    second.learner.load_state_dict(saved, trained)
    assert torch.equal(run(second.learner, x, SCHEDULE[rounds:], rounds).flat, undisturbed.flat)


def test_without_memory_there_is_nothing_to_save(config):
    federation = compose(config())
    x = run(federation.learner, federation.start, ["AB"])
    assert federation.learner.state_dict() == {}
    federation.learner.load_state_dict({}, ())
    fresh = compose(config())
    assert torch.equal(run(federation.learner, x, ["AB"], 1).flat, run(fresh.learner, x, ["AB"], 1).flat)


# --- what fit promises


def test_fit_never_changes_its_input_and_repeats_itself(config):
    federation = compose(config("bert", "train.weight_decay=0.1"))
    x = noisy(federation.start)
    before = x.flat.clone()
    once = federation.learner.fit(x, "AB")
    assert torch.equal(x.flat, before) and not x.flat.requires_grad and not once.flat.requires_grad
    assert torch.equal(federation.learner.fit(x, "AB").flat, once.flat)


@pytest.mark.parametrize("kept", ["round", "phase", "keep"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_frozen_factor_is_held_bit_for_bit(config, optimizer, kept):
    words = [*OPTIMIZERS[optimizer], "train.weight_decay=0.1", f"train.optimizer_state={kept}"]
    federation = compose(config("bert", *words))
    x = run(federation.learner, noisy(federation.start), ["AB", "AB"])
    after = run(federation.learner, x, ["B", "B"], 2)
    assert torch.equal(after.select("A").flat, x.select("A").flat)
    assert not torch.equal(after.select("B").flat, x.select("B").flat)
    assert not torch.equal(after.select("head").flat, x.select("head").flat), "a head trains in every round"
    last = run(federation.learner, after, ["A"], 4)
    assert torch.equal(last.select("B").flat, after.select("B").flat)
    assert not torch.equal(last.select("A").flat, after.select("A").flat)


def test_A_has_no_gradient_while_B_is_zero(config):
    federation = compose(config("bert", "train.local_steps=1"))
    x = federation.learner.fit(federation.start, "A")
    assert torch.equal(x.select("A", "B").flat, federation.start.select("A", "B").flat)


def test_losses_are_the_means_over_the_local_steps(config):
    federation = compose(config("bert", "train.local_steps=3", "train.lr=1e-300", "train.block=3"))
    learner, x = federation.learner, noisy(federation.start)
    with learner.round(2) as trained:
        learner.fit(x, "B")
    for i in range(4):
        steps = [float(loss_of(federation, x.rows([i]), i, rows)) for rows in learner.shards.rows(i, 2, 3)]
        assert float(trained.losses[i]) == pytest.approx(np.mean(steps), rel=1e-12)


def test_training_lowers_the_loss(config):
    federation = compose(config("bert", "train.local_steps=20", "train.lr=0.05"))
    learner = federation.learner
    with learner.round(0) as first:
        x = learner.fit(federation.start, "AB")
    with learner.round(1) as second:
        learner.fit(x, "AB")
    assert (second.losses < first.losses - 0.1).all()


# --- divergence


def poisoned(x, client):
    flat = x.flat.clone()
    flat[client, x.spec.columns("B").start] = float("inf")
    return replace(x, flat=flat)


@pytest.mark.parametrize("block", [1, 3, 4])
def test_divergence_names_client_round_and_step(config, block):
    federation = compose(config("bert", f"train.block={block}"))
    told = r"loss of client 2 is nan in round 8, local step 1;.*train\.lr \(now 0\.01\)"
    with federation.learner.round(7), pytest.raises(DivergenceError, match=told):
        federation.learner.fit(poisoned(federation.start, 2), "AB")


def test_divergence_names_the_clients_own_number_in_a_shard(config):
    federation = compose(config(), clients=[2, 3], gather=lambda rows: rows)
    with pytest.raises(DivergenceError, match="loss of client 3 "):
        federation.learner.fit(poisoned(federation.start, 1), "AB")


def test_a_huge_learning_rate_diverges_in_a_later_step(config):
    federation = compose(config("bert", "train.optimizer=sgd", "train.lr=1e300", "train.local_steps=3"))
    with pytest.raises(DivergenceError, match="client 0 is nan in round 1, local step 2"):
        federation.learner.fit(federation.start, "AB")


def test_evaluation_after_divergence_has_no_dropout(config):
    federation = compose(config("bert", "adapter.dropout=0.5", "model.dropout=0.5", "train.batch=16"))
    x, learner = noisy(federation.start), federation.learner
    before = learner.evaluate(x, federation.eval_data, 64)
    with pytest.raises(DivergenceError):
        learner.fit(poisoned(x, 3), "AB")
    after = learner.evaluate(x, federation.eval_data, 64)
    assert after.loss.tolist() == before.loss.tolist()


# --- evaluation


TASKS = {"classification": (), "regression": ("task.kind=regression", "data.label=score"), "causal-lm": CAUSAL}


def evaluate_plainly(federation, x):
    """One client and one row at a time; (metric, loss) by the definitions."""
    task, data, found = federation.config.task.kind, federation.eval_data, []
    for i in range(x.clients):
        federation.model.bind_adapters(x.rows([i]))
        losses, tokens, predictions = [], [], []
        for row in range(len(data)):
            ids = torch.tensor(data.ids[data.starts[row] : data.starts[row + 1]].astype("int64"))[None]
            types = None if data.types is None else torch.tensor(data.types[data.starts[row] : data.starts[row + 1]])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if types is not None:
                inputs["token_type_ids"] = types[None].long()
            with torch.no_grad():
                logits = federation.model(inputs)[0]
            if task == "classification":
                losses.append(-logits.log_softmax(0)[int(data.labels[row])])
                predictions.append(int(logits.argmax()))
            elif task == "regression":
                losses.append((logits[0] - float(data.labels[row])) ** 2)
                predictions.append(float(logits[0]))
            else:
                each = -logits[:-1].log_softmax(1)[torch.arange(len(ids[0]) - 1), ids[0, 1:]]
                losses.append(each.sum())
                tokens.append(len(each))
        loss = float(sum(losses)) / (sum(tokens) if tokens else len(losses))
        found.append((metric_of(task, predictions, data.labels, loss), loss))
    return np.array(found).T


def metric_of(task, predictions, labels, loss):
    if task == "classification":
        return np.mean(np.array(predictions) == labels)
    if task == "causal-lm":
        return loss
    ranks = [np.argsort(np.argsort(values)) for values in (predictions, labels)]  # no ties in these data
    return np.corrcoef(*ranks)[0, 1]


@pytest.mark.parametrize(
    "kind, task",
    others_slow([("bert", "classification"), ("bert", "regression"), *(("llama", task) for task in TASKS)], [0, 2]),
)
def test_evaluation_equals_a_plain_loop(config, kind, task):
    federation = compose(config(kind, *TASKS[task], "data.holdout=0.3"))
    x = noisy(federation.start, 0.5)
    scores = federation.learner.evaluate(x, federation.eval_data, 5)
    metric, loss = evaluate_plainly(federation, x)
    assert scores.rows == len(federation.eval_data) >= 15
    assert scores.metric == pytest.approx(metric, rel=1e-10) and scores.loss == pytest.approx(loss, rel=1e-10)
    assert len(set(loss)) == 4, "all clients score alike"


@pytest.mark.parametrize("tokens", [1, 40, 100_000])
def test_evaluation_depends_neither_on_batch_size_nor_on_clients_per_graph(config, monkeypatch, tokens):
    federation = compose(config("bert", "data.holdout=0.3"))
    x = noisy(federation.start, 0.5)
    expected = federation.learner.evaluate(x, federation.eval_data, 1)
    monkeypatch.setattr(learner_module, "_EVALUATED", tokens)
    for batch in (1, 4, 64):
        found = federation.learner.evaluate(x, federation.eval_data, batch)
        assert np.abs(found.loss - expected.loss).max() < 1e-12 and (found.metric == expected.metric).all()


def test_equal_clients_get_equal_scores(config):
    federation = compose(config("bert", "data.holdout=0.3"))
    one = noisy(federation.start).rows([1])
    same = Adapters(one.spec, one.flat.repeat(4, 1), one.ranks.repeat(4))
    alone = federation.learner.evaluate(one, federation.eval_data, 8)
    together = federation.learner.evaluate(same, federation.eval_data, 8)
    assert together.loss.tolist() == alone.loss.tolist() * 4 and together.metric.tolist() == alone.metric.tolist() * 4


def test_equal_values_at_different_ranks_are_different_models(config):
    # The update is scaled by alpha / rank, so equal factors do not make equal clients.
    federation = compose(config("bert", "algorithm.name=local", "adapter.rank=[1, 3, 3, 3]", "data.holdout=0.3"))
    x = noisy(federation.start, 1.0)
    flat = x.flat[:1].clone()
    padded = Adapters(x.spec, flat, x.ranks[:1])
    for A, B in zip(padded.A.values(), padded.B.values(), strict=True):
        A[:, 1:], B[:, :, 1:] = 0, 0
    two = Adapters(x.spec, flat.repeat(2, 1), torch.tensor([1, 3]))
    each = [federation.learner.evaluate(two.rows([i]), federation.eval_data, 8).loss[0] for i in (0, 1)]
    assert abs(each[0] - each[1]) > 1e-5
    assert federation.learner.evaluate(two, federation.eval_data, 8).loss.tolist() == pytest.approx(each, rel=1e-12)


# --- clients that do not keep step


def test_who_does_not_train_stays_and_has_no_loss(config):
    federation = compose(config("bert", "train.optimizer_state=keep"))
    learner, x = federation.learner, noisy(federation.start)
    with learner.round(0, clients=[1, 3]) as trained:
        found = learner.fit(x, "AB")
    assert torch.equal(found.flat[[0, 2]], x.flat[[0, 2]]) and not torch.equal(found.flat[[1, 3]], x.flat[[1, 3]])
    assert trained.losses.isnan().tolist() == [True, False, True, False]
    assert learner.memory is not None
    assert learner.memory.steps["A"].tolist() == [0, 2, 0, 2], "memory moves with those who train"
    with learner.round(0, clients=[]):
        assert torch.equal(learner.fit(x, "AB").flat, x.flat)


@pytest.mark.parametrize("kept", ["round", "keep"])
@pytest.mark.parametrize("block", [1, 3])
def test_a_job_is_the_same_whenever_and_with_whomever_it_is_done(config, kept, block):
    """Rows, dropout and memory follow (client, job); only sums may be taken in another order."""
    words = [f"train.optimizer_state={kept}", "adapter.dropout=0.2", f"train.block={block}", "train.batch=[4,3,2,4]"]
    together, apart = compose(config("bert", *words)), compose(config("bert", *words))
    expected = run(together.learner, together.start, ["B", "AB", "A"])
    x, jobs = apart.start, [0, 0, 0, 0]
    for t, places in enumerate([[2], [0, 2], [1, 3], [2], [3, 0, 1], [0], [3, 1]]):
        for blocks in ("B", "AB", "A"):
            now = [place for place in places if ("B", "AB", "A")[jobs[place]] == blocks]
            with apart.learner.round(t, jobs, now):
                x = apart.learner.fit(x, blocks)
        jobs = [job + (place in places) for place, job in enumerate(jobs)]
    assert jobs == [3, 3, 3, 3]
    assert (x.flat - expected.flat).abs().max() < 1e-12


def test_divergence_names_the_job(config):
    federation = compose(config("bert", "train.optimizer=sgd", "train.lr=1e300"))
    told = r"client 1 is \S+ in round 7, local step"
    with federation.learner.round(9, [4, 6, 0, 0], [1]), pytest.raises(DivergenceError, match=told):
        federation.learner.fit(federation.start, "AB")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_coordinates_that_a_mask_closes_do_not_move_under_decay(config, optimizer):
    """Up to the last step's weight decay, which the rule undoes at the next; and what is open moves as ever."""
    federation = compose(config("bert", *OPTIMIZERS[optimizer], "train.weight_decay=0", "train.local_steps=3"))
    x = noisy(federation.start)
    plain = federation.learner.fit(x, "AB")
    free = torch.ones_like(x.flat, dtype=torch.bool)
    assert torch.equal(federation.learner.fit(x, LocalPlan("AB", Masked(free))).flat, plain.flat)
    free[1, ::2] = False
    found = federation.learner.fit(x, LocalPlan("AB", Masked(free)))
    assert torch.equal(found.flat[~free], x.flat[~free])
    assert torch.equal(found.flat[0], plain.flat[0]) and not torch.equal(found.flat[1, 1::2], x.flat[1, 1::2])
