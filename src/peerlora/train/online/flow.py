"""Flow policies: N Euler steps from noise to an action, each a block of its own, with a twin critic as the head.

A net may act in front of the flow or in its place; the flow itself is then frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from peerlora.lora.adapters import LayerSpec
from peerlora.lora.attach import Targets

CRITIC = "critic"
"""The head's name among the modules of a policy."""
TWINS = 2
"""Critics, of which the smaller value counts."""
FLOW, STEERED, ONE_STEP = "flow", "steered", "one-step"
"""What acts: the flow from the noise; the flow from what a net makes of the noise; a net alone."""
NOISE_LIMIT = 1.5
"""The largest size of steered noise, as in DSRL."""
Velocity = Callable[[int, Tensor], Tensor]
"""(block, actions) -> velocities of these actions, in fixed states."""


@dataclass(frozen=True)
class FlowShape:
    """The sizes of a flow policy, and what acts."""

    observation: int
    action: int
    blocks: int
    width: int
    actor: str = FLOW

    def to_dict(self) -> dict[str, Any]:
        """The same as a mapping, which PEFT asks of a model's config; of a flow that acts itself, its sizes alone."""
        settings = asdict(self)
        return {name: value for name, value in settings.items() if (name, value) != ("actor", FLOW)}


class FlowPolicy(nn.Module):
    """A flow-matching policy, discretised: ``a_0 ~ N(0, I)``, ``a_k+1 = a_k + v_k(s, a_k) / N``, clipped to [-1, 1].

    Block k is an MLP of two hidden layers that sees state, action and time.  It is trained on times in
    [k/N, (k+1)/N); the Euler step takes it at k/N.  Rows may be those of several clients, one client after another.
    ``actor`` is one more such MLP, without time, where a net acts; else it has no layers.
    """

    def __init__(self, shape: FlowShape):
        super().__init__()
        self.config = shape
        into = shape.observation + shape.action
        self.blocks = nn.ModuleList(_layers(into + 1, shape.width, shape.action) for _ in range(shape.blocks))
        nets = 0 if shape.actor == FLOW else 1
        self.actor = nn.ModuleList(_layers(into, shape.width, shape.action) for _ in range(nets))
        self.critic = TwinCritic(into, shape.width)

    def velocity(
        self, block: int, observation: Float[Tensor, "row observation"], action: Float[Tensor, "row action"], time: Any
    ) -> Float[Tensor, "row action"]:
        """``v_block`` at a time, a number or [row, 1]."""
        when = torch.as_tensor(time, dtype=action.dtype).expand(len(action), 1)
        return _apply(self.blocks[block], torch.cat([observation, action, when], dim=1))

    def net(
        self, observation: Float[Tensor, "row observation"], noise: Float[Tensor, "row action"]
    ) -> Float[Tensor, "row action"]:
        """What the acting net gives: of ``one-step`` an action, without bounds; of ``steered`` a move of the noise."""
        return _apply(self.actor[0], torch.cat([observation, noise], dim=1))

    def begin(
        self, observation: Float[Tensor, "row observation"], noise: Float[Tensor, "row action"]
    ) -> Float[Tensor, "row action"]:
        """What the flow begins with: the noise, or within its limit what the steering net makes of it."""
        if self.config.actor != STEERED:
            return noise
        return NOISE_LIMIT * torch.tanh(noise / NOISE_LIMIT + self.net(observation, noise))

    def at_start(self, observation: Float[Tensor, "row observation"]) -> Velocity:
        """The velocities of Euler steps in these states."""
        return lambda block, action: self.velocity(block, observation, action, block / self.config.blocks)

    def forward(
        self, observation: Float[Tensor, "row observation"], noise: Float[Tensor, "row action"]
    ) -> Float[Tensor, "row action"]:
        """Actions in [-1, 1]; ``noise`` is standard normal."""
        if self.config.actor == ONE_STEP:
            return self.net(observation, noise).clamp(-1.0, 1.0)
        return self.chain(observation, noise).actions

    def chain(self, observation: Float[Tensor, "row observation"], noise: Float[Tensor, "row action"]) -> Chain:
        """What the flow passes through in these states."""
        return euler_chain(self.at_start(observation), self.begin(observation, noise), self.config.blocks)


class TwinCritic(nn.Module):
    """Two critics of one client, each an MLP of two hidden layers; of many clients see `twin_values`."""

    def __init__(self, into: int, width: int):
        super().__init__()
        for twin in range(TWINS):
            self.add_module(str(twin), _layers(into, width, 1))

    def forward(
        self, observation: Float[Tensor, "row observation"], action: Float[Tensor, "row action"]
    ) -> Float[Tensor, "twin row"]:
        """Both values of actions in states."""
        head = {f"{CRITIC}.{name}": value[None] for name, value in self.named_parameters()}
        return twin_values(head, observation[None], action[None])[:, 0]


@dataclass(frozen=True)
class Chain:
    """What a flow passes through on its way to an action."""

    inputs: Float[Tensor, "block *row action"]
    velocities: Float[Tensor, "block *row action"]
    arrival: Float[Tensor, "*row action"]
    """Where the last step leads, without bounds."""

    @property
    def actions(self) -> Float[Tensor, "*row action"]:
        """In [-1, 1]."""
        return self.arrival.clamp(-1.0, 1.0)


def euler_chain(velocity: Velocity, noise: Tensor, blocks: int) -> Chain:
    """``a_k+1 = a_k + v_k(a_k) / blocks`` from ``noise`` on."""
    action, inputs, velocities = noise, [], []
    for block in range(blocks):
        inputs.append(action)
        velocities.append(velocity(block, action))
        action = action + velocities[-1] / blocks
    return Chain(torch.stack(inputs), torch.stack(velocities), action)


def twin_values(
    head: Mapping[str, Tensor], observation: Float[Tensor, "client row _"], action: Float[Tensor, "client row _"]
) -> Float[Tensor, "twin client row"]:
    """Both critics' values; ``head``: [client, ...] tensors by parameter name, as in adapters.

    The hidden layers are normalised (layer norm without parameters).
    """
    values = []
    for twin in range(TWINS):
        hidden = torch.cat([observation, action], dim=2)
        for layer in range(3):
            if layer:
                hidden = F.silu(F.layer_norm(hidden, hidden.shape[-1:]))
            weight, bias = (head[f"{CRITIC}.{twin}.{layer}.{part}"] for part in ("weight", "bias"))
            hidden = torch.baddbmm(bias[:, None], hidden, weight.mT)
        values.append(hidden[..., 0])
    return torch.stack(values)


def flow_targets(policy: FlowPolicy) -> Targets:
    """All layers of what acts are adapted, those of the flow's blocks or of the net; the critic is the head."""
    acts = "blocks." if policy.config.actor == FLOW else "actor."
    layers = [(name, module) for name, module in policy.named_modules() if isinstance(module, nn.Linear)]
    adapted = [(name, module) for name, module in layers if name.startswith(acts)]
    return Targets(tuple(LayerSpec(name, each.in_features, each.out_features) for name, each in adapted), (CRITIC,))


def draw_layers(layers: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of all linear layers inside anew, uniformly as torch does, from ``generator``."""
    with torch.no_grad():
        for module in layers.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                for values in (module.weight, module.bias):
                    drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64)
                    values.copy_((drawn * 2 - 1) * bound)


def _apply(layers: nn.Module, inputs: Float[Tensor, "row _"]) -> Float[Tensor, "row _"]:
    first, second, last = layers  # pyright: ignore[reportGeneralTypeIssues]
    return last(F.silu(second(F.silu(first(inputs)))))


def _layers(into: int, width: int, out: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(into, width), nn.Linear(width, width), nn.Linear(width, out)])
