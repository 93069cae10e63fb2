"""One client's round of a flow policy written out: weights merged by hand, loops over everything, torch's AdamW."""

import numpy as np
import torch
import torch.nn.functional as F

from peerlora.randomness import derive

DT, EFFORT = 0.2, 0.3


def generator(seed, purpose, client, round):
    return torch.Generator().manual_seed(derive(seed, f"policy {purpose}", client=client, round=round))


def normal(seed, purpose, client, round, *shape):
    return torch.randn(*shape, generator=generator(seed, purpose, client, round), dtype=torch.float64)


class PlainClient:
    """A client alone: ``weights`` [block][layer] -> (W, b) of the base, ``factors`` name -> (A, B), ``critic`` name."""

    def __init__(self, config, client, base, factors, critic):
        self.config, self.client, self.base = config, client, base
        self.factors = {name: [each.clone().requires_grad_() for each in pair] for name, pair in factors.items()}
        self.critic = {name: each.clone().requires_grad_() for name, each in critic.items()}
        self.target = {name: each.clone() for name, each in critic.items()}
        self.memory, self.seen = {}, 0
        self.goal = np.array([config.partition.values["goal_x"][client], 0.0])
        self.scaling = config.adapter.alpha / config.adapter.rank

    def velocity(self, block, state, action):
        hidden = torch.cat([state, action, torch.tensor([block / self.config.task.blocks], dtype=torch.float64)])
        for layer in range(3):
            weight, bias = self.base[f"blocks.{block}.{layer}"]
            A, B = self.factors[f"blocks.{block}.{layer}"]
            hidden = (weight + self.scaling * B @ A) @ hidden + bias
            hidden = F.silu(hidden) if layer < 2 else hidden
        return hidden

    def act(self, state, noise):
        """The inputs and velocities of all blocks, and the action."""
        action, inputs, velocities = noise, [], []
        for block in range(self.config.task.blocks):
            inputs.append(action)
            velocities.append(self.velocity(block, state, action).detach())
            action = action + velocities[-1] / self.config.task.blocks
        return inputs, velocities, action.clamp(-1, 1)

    def value(self, critic, twin, state, action):
        hidden = torch.cat([state, action])
        for layer in range(3):
            if layer:
                centred = hidden - hidden.mean()
                hidden = F.silu(centred / (centred.square().mean() + 1e-5).sqrt())
            hidden = critic[f"critic.{twin}.{layer}.weight"] @ hidden + critic[f"critic.{twin}.{layer}.bias"]
        return hidden[0]

    def explore(self, t):
        online, seed = self.config.online, self.config.seed
        shape = (online.episodes, online.horizon, 2)
        noise, wandering = (normal(seed, what, self.client, t, *shape) for what in ("actions", "exploration"))
        level = online.noise + (online.noise_end - online.noise) * t / (self.config.train.rounds - 1)
        seeds = derive(seed, "policy episodes", client=self.client, round=t)
        for episode in range(online.episodes):
            place = np.random.default_rng(derive(seeds, f"episode {episode}")).uniform(-1, 1, 2)
            speed = np.zeros(2)
            for step in range(online.horizon):
                state = torch.tensor(np.concatenate([place, speed]))
                action = self.act(state, noise[episode, step])[2] + level * wandering[episode, step]
                action = action.clamp(-1, 1)
                push = action.numpy()
                reward = -DT * (((place - self.goal) ** 2).sum() + EFFORT * (push**2).sum())
                place, speed = place + DT * speed, speed + DT * (2.0 * push - 0.5 * speed)
                reached = torch.tensor(np.concatenate([place, speed]))
                self.memory[self.seen % online.replay] = (state, action, reward, reached)
                self.seen += 1

    def fit(self, t, turn):
        self.explore(t)
        config, online, train = self.config, self.config.online, self.config.train
        rows = train.local_steps * train.batch
        draws = torch.rand(rows, generator=generator(config.seed, "replay", self.client, t), dtype=torch.float64)
        noise = normal(config.seed, "flow", self.client, t, rows, 2)
        lessons = []
        for row in range(rows):
            state, action, reward, reached = self.memory[int(draws[row] * len(self.memory))]
            following = self.act(reached, noise[row])[2]
            lessons.append((state, action, reward, reached, self.act(state, noise[row]), following))
        pairs = [pair for name, pair in self.factors.items() if turn is None or name.startswith(f"blocks.{turn}.")]
        trained = [*(each for pair in pairs for each in pair), *self.critic.values()]
        optimizer = torch.optim.AdamW(trained, lr=train.lr, weight_decay=0.0)
        for k in range(train.local_steps):
            part = lessons[k * train.batch : (k + 1) * train.batch]
            loss = self.loss(part, [turn] if turn is not None else range(config.task.blocks))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for name, each in self.target.items():
                    each.lerp_(self.critic[name], online.target_rate)

    def loss(self, part, turns):
        online, total = self.config.online, 0.0
        for state, action, reward, reached, _, following in part:
            with torch.no_grad():
                ahead = min(self.value(self.target, twin, reached, following) for twin in (0, 1))
            for twin in (0, 1):
                error = self.value(self.critic, twin, state, action) - (reward + online.discount * ahead)
                total = total + error**2 / len(part)
        for block in turns:
            found = []
            for state, *_, (inputs, velocities, _), _ in part:
                jumped = inputs[block] + (1 - block / self.config.task.blocks) * velocities[block]
                jumped = jumped.clamp(-1, 1).requires_grad_()
                frozen = {name: each.detach() for name, each in self.critic.items()}
                values = torch.stack([self.value(frozen, twin, state, jumped) for twin in (0, 1)])
                found.append((values, torch.autograd.grad(values.mean(), jumped)[0]))
            size = torch.stack([values.detach().abs().mean() for values, _ in found]).mean()
            for (state, *_, (inputs, velocities, _), _), (_, gradient) in zip(part, found, strict=True):
                wanted = velocities[block] + online.beta * gradient / size
                total = total + (self.velocity(block, state, inputs[block]) - wanted).square().sum() / len(part)
        return total
