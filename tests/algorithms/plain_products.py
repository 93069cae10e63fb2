"""The product methods once more, as a reader of the papers would write them: one client at a time, dense matrices."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from peerlora.config.sections import TrainConfig
from peerlora.lora.adapters import mask_ranks


@dataclass
class Client:
    """One client's factors at their real rank, by layer, and its head."""

    B: dict
    A: dict
    head: np.ndarray
    alpha: float

    @property
    def rank(self):
        return len(next(iter(self.A.values())))

    @property
    def scaling(self):
        return self.alpha / self.rank

    def product(self, layer):
        return self.scaling * self.B[layer] @ self.A[layer]

    def cut(self, rank):
        B = {n: B[:, :rank].copy() for n, B in self.B.items()}
        return Client(B, {n: A[:rank].copy() for n, A in self.A.items()}, self.head, self.alpha)


def taken_apart(x):
    clients = []
    for i, r in enumerate(x.ranks.tolist()):
        B = {n: B[i, :, :r].double().numpy().copy() for n, B in x.B.items()}
        A = {n: A[i, :r].double().numpy().copy() for n, A in x.A.items()}
        clients.append(Client(B, A, x.select("head").flat[i].double().numpy().copy(), x.spec.alpha))
    return clients


def put_together(like, clients):
    x = replace(like, flat=torch.zeros_like(like.flat), ranks=torch.tensor([client.rank for client in clients]))
    for i, client in enumerate(clients):
        for n, B in client.B.items():
            x.B[n][i, :, : client.rank] = torch.from_numpy(B)
            x.A[n][i, : client.rank] = torch.from_numpy(client.A[n])
        x.flat[i, x.spec.columns("head")] = torch.from_numpy(client.head)
    return x


def average(w, arrays):
    return sum(weight * array for weight, array in zip(w, arrays, strict=True))


def decaf(clients, i, w, t):
    own, result = clients[i], clients[i].cut(clients[i].rank)
    for n in own.A:
        P = average(w, [client.product(n) for client in clients]) / own.scaling
        U, values, V = np.linalg.svd(P)
        for k in range(own.rank):
            if k >= len(values) or values[k] < 1e-12 * max(values[0], 1e-300):
                result.B[n][:, k] = 0  # and A keeps its row
                continue
            sign = 1 if V[k][np.abs(V[k]).argmax()] > 0 else -1
            result.B[n][:, k] = sign * np.sqrt(values[k]) * U[:, k]
            result.A[n][k] = sign * np.sqrt(values[k]) * V[k]
    result.head = average(w, [client.head for client in clients])
    return result


def fair(ridge):
    def rule(clients, i, w, t):
        result = clients[i].cut(clients[i].rank)
        for n in result.A:
            B, A = (average(w, [getattr(client, f)[n] for client in clients]) for f in "BA")
            D = average(w, [client.B[n] @ client.A[n] for client in clients])
            result.B[n] = B + (D - B @ A) @ A.T @ np.linalg.inv(A @ A.T + ridge * np.eye(len(A)))
            result.A[n] = A
        result.head = average(w, [client.head for client in clients])
        return result

    return rule


def rotation(M):
    U, _, V = np.linalg.svd(M)
    fix = np.eye(len(M))
    fix[-1, -1] = np.linalg.det(U @ V)
    return U @ fix @ V


def fedrot(strength, first="A"):
    def rule(clients, i, w, t):
        own, result = clients[i], clients[i].cut(clients[i].rank)
        for n in own.A:
            turned_B, turned_A = [], []
            for other in clients:
                M = other.A[n] @ own.A[n].T if (t % 2 == 1) == (first == "A") else other.B[n].T @ own.B[n]
                R = rotation((1 - strength) * np.eye(own.rank) + strength * rotation(M)) if t > 0 else np.eye(own.rank)
                turned_B.append(other.B[n] @ R)
                turned_A.append(R.T @ other.A[n])
            result.B[n], result.A[n] = average(w, turned_B), average(w, turned_A)
        result.head = average(w, [client.head for client in clients])
        return result

    return rule


def tail_size(client, kept):
    return sum(np.linalg.norm(client.B[n][:, kept:]) * np.linalg.norm(client.A[n][kept:]) for n in client.A)


def hetlora_local(gamma, penalty, smallest):
    """What a client does after training, given how it began the round."""

    def local(before, client):
        kept = min(max(int(gamma * client.rank + 1e-9), smallest), client.rank)
        for n in client.A:
            a, b = np.linalg.norm(client.A[n][kept:]), np.linalg.norm(client.B[n][:, kept:])
            client.A[n][kept:] *= max(0, 1 - penalty * b / a) if a > 0 else 1
            client.B[n][:, kept:] *= max(0, 1 - penalty * a / b) if b > 0 else 1
        if not tail_size(client, kept) < tail_size(before, kept):
            return client
        cut = client.cut(kept)
        cut.B = {n: B * client.scaling / cut.scaling for n, B in cut.B.items()}
        return cut

    return local


def hetlora(clients, i, w, t):
    own, largest = clients[i], max(client.rank for client in clients)
    sizes = [np.sqrt(sum(np.linalg.norm(client.product(n)) ** 2 for n in client.A)) for client in clients]
    v = w * sizes / np.sum(w * sizes)
    result = own.cut(own.rank)
    for n in own.A:
        padded_B = [np.pad(c.scaling / own.scaling * c.B[n], ((0, 0), (0, largest - c.rank))) for c in clients]
        padded_A = [np.pad(c.A[n], ((0, largest - c.rank), (0, 0))) for c in clients]
        result.B[n], result.A[n] = average(v, padded_B)[:, : own.rank], average(v, padded_A)[: own.rank]
    result.head = average(v, [client.head for client in clients])
    return result


def run_plain(x, learner, topology, rule, rounds, local=lambda before, client: client, private_head=False):
    """The state after every round."""
    states = []
    for t in range(rounds):
        with learner.round(t):
            before = taken_apart(x)
            trained = [local(*pair) for pair in zip(before, taken_apart(learner.fit(x, "AB")), strict=True)]
        W, after = topology.at(t).W, []
        for i, client in enumerate(trained):
            alone = np.count_nonzero(W[i]) == 1
            after.append(client if alone else rule(trained, i, W[i], t))
            if private_head:
                after[-1] = replace(after[-1], head=client.head)
        x = put_together(x, after)
        states.append(x)
    return states


class Drift:
    """A learner without a model: every client's factors and head wander in their own direction, padding stays zero."""

    def __init__(self, clients, size=0.3):
        self.clients, self.size, self.t, self.settings = list(clients), size, 0, TrainConfig()

    @contextmanager
    def round(self, t):
        self.t = t
        yield

    def fit(self, x, train):
        flat = x.flat.clone()
        for row, i in enumerate(self.clients):
            generator = torch.Generator().manual_seed(1000 * self.t + i)
            flat[row] += self.size * torch.randn(flat.shape[1], generator=generator, dtype=torch.float64).to(flat.dtype)
        for block in {"A", "B"} - set(train):
            flat[:, x.spec.columns(block)] = x.flat[:, x.spec.columns(block)]
        return mask_ranks(replace(x, flat=flat))
