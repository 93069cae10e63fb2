"""RAC-LoRA's quadratic: a chain of blocks reaches the optimum where LoRA diverges and one frozen factor stalls."""

import math
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "rac_toy.py"))


def floor_of_one_factor():
    """The smallest loss that any B reaches with the common start's A."""
    generator = torch.Generator().manual_seed(0)
    learner = EXAMPLE["Quadratic"](generator)
    spec = EXAMPLE["AdapterSpec"](
        (EXAMPLE["LayerSpec"]("layer", EXAMPLE["D_IN"], EXAMPLE["D_OUT"]),), EXAMPLE["RANK"], 2.0
    )
    A = EXAMPLE["initial_adapters"](spec, [EXAMPLE["RANK"]], {}, generator, torch.float64).A["layer"][0]
    root = learner.curvature.sqrt()
    target = learner.target.mean(0)
    B = torch.linalg.lstsq((A * root).T, (target * root).T).solution.T
    return float(((B @ A - target) * root).square().sum()) / 2


@pytest.mark.slow
def test_the_chain_arrives_where_the_others_stall_or_diverge(tmp_path, capsys, drawn):
    EXAMPLE["main"](str(tmp_path / "toy.svg"))
    reached = {line[:25].strip(): float(line[25:]) for line in capsys.readouterr().out.splitlines()}
    assert math.isnan(reached["dec-lora complete"])
    assert floor_of_one_factor() > 100 and reached["ffa-lora complete"] == pytest.approx(
        floor_of_one_factor(), rel=1e-3
    )
    assert reached["rac-lora complete"] < 1e-6
    assert reached["rac-lora ring mix_merged"] < 0.2 * reached["rac-lora ring"] < 0.2
    assert (tmp_path / "toy.svg").stat().st_size > 10_000


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_speed_is_proportional_to_the_rank(rank):
    """One block leaves ``(1 - r/d_in)`` of the expected squared error where all directions curve alike."""
    generator, blocks = torch.Generator().manual_seed(0), 20
    spec = EXAMPLE["AdapterSpec"](
        (EXAMPLE["LayerSpec"]("layer", EXAMPLE["D_IN"], EXAMPLE["D_OUT"]),), rank, float(rank)
    )
    learner = EXAMPLE["Quadratic"](generator)
    learner.curvature = torch.ones(EXAMPLE["D_IN"], dtype=torch.float64)
    learner.target = 5 * torch.randn(40, EXAMPLE["D_OUT"], EXAMPLE["D_IN"], generator=generator, dtype=torch.float64)
    topology = EXAMPLE["build_topology"](EXAMPLE["parse_spec"]("edges edges=[[0,1]] allow_disconnected=true"), 40, 0)
    peers = EXAMPLE["StackedExchange"](topology, range(40))
    algorithm = EXAMPLE["build_algorithm"]("rac-lora", {"chain": 1, "settle": 0})
    x = algorithm.start(EXAMPLE["initial_adapters"](spec, [rank] * 40, {}, generator, torch.float64), peers)
    for t in range(blocks):
        peers.begin(t)
        x = algorithm.round(t, x, learner, peers)
    alone = slice(2, None)
    left = (EXAMPLE["weights"](x) - learner.target)[alone].square().sum() / learner.target[alone].square().sum()
    per_block = float(left) ** (1 / blocks)
    assert 1 - per_block == pytest.approx(rank / EXAMPLE["D_IN"], rel=0.25)
