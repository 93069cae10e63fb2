"""One client that several processes train (DDP): the first speaks, and all go on with the mixed adapters."""

import multiprocessing

import pytest
import torch
from loop_rigs import TOLERANCE, alone, batches, optimizer_of, peft_model, plain_loops, read, take_steps
from safetensors.torch import load_file, save_file

from peerlora.config.loading import load_config
from peerlora.runtime.compose import compose
from peerlora.runtime.launch.processes import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_reports")]
ONE = ["clients=1", "topology.kind=complete", "peer.join=1", "train.dtype=fp64", "train.rounds=4", "train.lr=0.001"]
METHODS = [["algorithm.name=adf-lora", "algorithm.interval=1"], ["algorithm.name=dfedadmm", "train.optimizer=sgd"]]


def train(yaml, rank, port, folder):
    """One of two processes; both see the same rows, so that the mean of their gradients is that of one process."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    config = load_config(yaml)
    federation = compose(config)
    model = peft_model(config, federation)
    wrapped, optimizer = DistributedDataParallel(model), optimizer_of(config, model)
    rows = batches(config, federation, 0)
    with alone(config, folder, wrapped, optimizer) as peer:
        assert peer.driver.group.size == 2
        take_steps(peer, wrapped, optimizer, config, federation, rows)
    save_file({"flat": read(model)}, folder / f"rank-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_of_one_client_end_as_one_process(config, tmp_path, method):
    chosen = config("bert", *ONE, *method, "train.clip=0.5")
    whole, _ = plain_loops(chosen, tmp_path / "whole")
    (tmp_path / "run.yaml").write_text(chosen.to_yaml())
    context, (port,) = multiprocessing.get_context("spawn"), free_ports(1)
    words = [(tmp_path / "run.yaml", rank, port, tmp_path) for rank in range(2)]
    processes = [context.Process(target=train, args=own) for own in words]
    for each in processes:
        each.start()
    for each in processes:
        each.join(250)
    assert [each.exitcode for each in processes] == [0, 0]
    for rank in range(2):
        flat = load_file(tmp_path / f"rank-{rank}.safetensors")["flat"]
        assert torch.allclose(flat, whole[0].adapters.flat[0], rtol=0, atol=TOLERANCE)
    assert whole[0].adapters.B and (tmp_path / "peer-0" / "summary.json").is_file()
