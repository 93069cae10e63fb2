"""The methods that merge, as a reader of the papers would write them: one client at a time, a dense base for each."""

from dataclasses import dataclass, replace

import numpy as np
import plain_products as plain
import torch

from peerlora.lora.merged import Merged
from peerlora.randomness import torch_generator


def no_base(client):
    return {n: np.zeros((client.B[n].shape[0], client.A[n].shape[1])) for n in client.A}


def as_adapters(like, clients, bases=None):
    """What a learner wants, with the bases' changes as what was merged."""
    x = plain.put_together(like, clients)
    if bases is None:
        return replace(x, merged=None)
    shapes = {layer.name: (layer.d_out, layer.d_in) for layer in x.spec.layers}
    full = {n: torch.stack([torch.from_numpy(base[n]) for base in bases]) for n in shapes}
    eye = {n: torch.eye(d_in, dtype=torch.float64)[None] for n, (_, d_in) in shapes.items()}
    return replace(x, merged=Merged.nothing(shapes, x.flat.double()).plus({n: (full[n], eye[n]) for n in shapes}))


def fresh(spec, seed, t, purpose, block):
    """A factor of the full rank for every layer, from the seed that all share."""
    generator, found = torch_generator(seed, f"shared {purpose}", round=t), {}
    for layer in spec.layers:
        shape, width = (
            ((spec.rank, layer.d_in), layer.d_in) if block == "A" else ((layer.d_out, spec.rank), layer.d_out)
        )
        uniform = torch.rand(shape[0] * shape[1], generator=generator, dtype=torch.float64).numpy()
        found[layer.name] = ((2 * uniform - 1) / np.sqrt(width)).reshape(shape)
    return found


def alone(W, i):
    return np.count_nonzero(W[i]) == 1


def rac(x, learner, topology, rounds, chain, settle, side):
    clients, states = plain.taken_apart(x), []
    bases = [no_base(client) for client in clients]
    active, frozen = ("B", "A") if side == "right" else ("A", "B")
    for t in range(rounds):
        with learner.round(t):
            block, place = divmod(t, chain + settle)
            if place == 0:
                drawn = fresh(x.spec, topology.seed, t, "frozen factor", frozen)
                for client, base in zip(clients, bases, strict=True):
                    for n in base:
                        base[n] += client.product(n) if block > 0 else 0
                        getattr(client, frozen)[n] = drawn[n].copy()
                        getattr(client, active)[n][:] = 0
            if place < chain:
                clients = plain.taken_apart(learner.fit(as_adapters(x, clients, bases), active))
        W, mixed = topology.at(t).W, []
        for i, client in enumerate(clients):
            own = client.cut(client.rank)
            for n in own.A:
                getattr(own, active)[n] = plain.average(W[i], [getattr(other, active)[n] for other in clients])
            own.head = plain.average(W[i], [other.head for other in clients])
            mixed.append(own)
        clients = mixed
        states.append((as_adapters(x, clients), [{n: W.copy() for n, W in base.items()} for base in bases]))
    return states


def merge_received(receive):
    """The loop of FLoRA and FedEx-LoRA: everybody trains, then every receiver with contacts merges."""

    def run(x, learner, topology, rounds):
        clients, states = plain.taken_apart(x), []
        bases = [no_base(client) for client in clients]
        for t in range(rounds):
            with learner.round(t):
                trained = plain.taken_apart(learner.fit(as_adapters(x, clients, bases), "AB"))
            W, clients = topology.at(t).W, []
            for i, client in enumerate(trained):
                if alone(W, i):
                    clients.append(client)
                    continue
                own = client.cut(client.rank)
                receive(own, bases[i], trained, W[i], x.spec, topology.seed, t)
                own.head = plain.average(W[i], [other.head for other in trained])
                clients.append(own)
            states.append((as_adapters(x, clients), [{n: W.copy() for n, W in base.items()} for base in bases]))
        return states

    return run


def flora(own, base, trained, w, spec, seed, t):
    drawn = fresh(spec, seed, t, "factors", "A")
    for n in base:
        base[n] += plain.average(w, [client.product(n) for client in trained])
        own.A[n], own.B[n] = drawn[n][: own.rank].copy(), np.zeros_like(own.B[n])


def fedex(own, base, trained, w, spec, seed, t):
    for n in base:
        own.A[n], own.B[n] = (plain.average(w, [getattr(client, f)[n] for client in trained]) for f in "AB")
        base[n] += plain.average(w, [client.product(n) for client in trained]) - own.product(n)


@dataclass
class Best:
    """A matrix and its best approximations."""

    matrix: np.ndarray

    def cut(self, rank):
        U, values, V = np.linalg.svd(self.matrix, full_matrices=False)
        return (U[:, :rank] * values[:rank]) @ V[:rank]

    def tail(self, rank):
        return float((np.linalg.svd(self.matrix)[1][rank:] ** 2).sum())


def capped(w, score, cap):
    """min(cap w, c w score) with the c for which it sums to 1, by bisection."""
    if np.count_nonzero(w) <= 1:
        return w
    low, high = 1e-30, 1e30
    for _ in range(300):
        c = np.sqrt(low * high)
        low, high = (c, high) if np.minimum(cap * w, c * w * score).sum() < 1 else (low, c)
    return np.minimum(cap * w, high * w * score)


def fedhl(x, learner, topology, rounds, weighting="squared", cap=2.0, growth=4):
    clients, states, bound = plain.taken_apart(x), [], growth * x.spec.rank
    references = [{n: Best(client.product(n)) for n in client.A} for client in clients]
    for t in range(rounds):
        with learner.round(t):
            trained = plain.taken_apart(learner.fit(as_adapters(x, clients), "AB"))
        error = np.array(
            [sum(F.tail(c.rank) for F in own.values()) for c, own in zip(trained, references, strict=True)]
        )
        score = {"squared": 1 / (error**2 + 1e-6), "plain": 1 / (error + 1e-6), "equal": np.ones(len(error))}[weighting]
        learnt = [
            {n: client.product(n) - F.cut(client.rank) for n, F in own.items()}
            for client, own in zip(trained, references, strict=True)
        ]
        W, before, clients, references = topology.at(t).W, references, [], []
        for i, client in enumerate(trained):
            own, reference = client.cut(client.rank), before[i]
            if not alone(W, i):
                v, reference = capped(W[i], score, cap), {}
                for n in own.A:
                    total = plain.average(W[i], [F[n].matrix for F in before])
                    total = total + plain.average(v, [step[n] for step in learnt])
                    reference[n] = Best(Best(total).cut(bound))
                    put_cut(own, n, total / own.scaling)
                own.head = plain.average(W[i], [other.head for other in trained])
            clients.append(own)
            references.append(reference)
        states.append((as_adapters(x, clients), [{n: F.matrix for n, F in own.items()} for own in references]))
    return states


def put_cut(own, n, P):
    U, values, V = np.linalg.svd(P)
    for k in range(own.rank):
        if k >= len(values) or values[k] < 1e-12 * max(values[0], 1e-300):
            own.B[n][:, k] = 0  # and A keeps its row
            continue
        sign = 1 if V[k][np.abs(V[k]).argmax()] > 0 else -1
        own.B[n][:, k], own.A[n][k] = sign * np.sqrt(values[k]) * U[:, k], sign * np.sqrt(values[k]) * V[k]
