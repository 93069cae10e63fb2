"""One client that several processes train (DDP): the first speaks, and all go on with the mixed adapters."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loop_rigs import TOLERANCE, alone, batches, optimizer_of, peft_model, plain_loops, read, take_steps
from safetensors.torch import load_file, save_file
from test_trainer_peer import trained

from peerlora.config.loading import load_config
from peerlora.runtime.compose import compose
from peerlora.runtime.launch.processes import free_ports
from peerlora.train.handover import LastJob, TrainJob
from peerlora.train.local_rules import DualProx
from peerlora.train.process_group import Remote, decode, encode

pytestmark = pytest.mark.usefixtures("no_reports")
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


@pytest.mark.slow
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


FLAT = torch.arange(3.0)
JOBS = [
    TrainJob(FLAT, ("A", "head"), 7, True, at=12),
    TrainJob(FLAT, ("B",), 1, False, at=0),
    TrainJob(FLAT, ("A", "B"), 2, False),
    LastJob(FLAT),
]


@pytest.mark.parametrize("job", JOBS)
def test_a_job_reaches_the_other_processes_whole(job):
    found, expected = vars(decode(encode(job), FLAT)), vars(job)
    assert found.pop("flat") is expected["flat"] and found == {k: v for k, v in expected.items() if k != "flat"}


def test_a_rule_stays_in_the_first_process():
    job = TrainJob(FLAT, ("A",), 1, False, DualProx(), 3)
    assert isinstance(decode(encode(job), FLAT).rule, Remote)


def torchrun(script, folder, *more):
    """Two processes, started as a user would; what they print stands in an error."""
    tests = Path(__file__).parent
    places = [tests, tests.parent / "equivalence", tests.parent, *map(Path, sys.path)]
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_ports(1)[0]}"]
    words += [tests / script, folder / "run.yaml", folder, *more]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.long
def test_processes_of_torchrun_go_on_within_a_round(config, tmp_path):
    """They are broken off after three steps, in the second round of two each, and go on with the fourth."""
    chosen = config("bert", *ONE, "algorithm.name=dec-lora", "train.optimizer=sgd")
    whole, _ = plain_loops(chosen, tmp_path / "whole")
    (tmp_path / "run.yaml").write_text(chosen.to_yaml())
    torchrun("torchrun_loop.py", tmp_path, 0, 3)
    torchrun("torchrun_loop.py", tmp_path, 3, 8)
    for rank in range(2):
        flat = load_file(tmp_path / f"rank-{rank}.safetensors")["flat"]
        assert torch.allclose(flat, whole[0].adapters.flat[0], rtol=0, atol=TOLERANCE)
        assert json.loads((tmp_path / f"begun-{rank}.json").read_text()) == 1, "one step of the round was taken before"


@pytest.mark.slow
def test_a_trainer_in_processes_of_torchrun_ends_as_one_with_twice_the_batch(config, tmp_path):
    """The two take minibatches in turn, whose mean gradient is that of both minibatches in one."""
    chosen = config("bert", *ONE, "algorithm.name=adf-lora", "algorithm.interval=1")
    (tmp_path / "run.yaml").write_text(chosen.to_yaml())
    batch = {"per_device_train_batch_size": 2 * chosen.batches[0]}
    whole, _, _ = trained(chosen, tmp_path / "whole", **batch)
    torchrun("torchrun_trainer.py", tmp_path)
    for rank in range(2):
        flat = load_file(tmp_path / f"rank-{rank}.safetensors")["flat"]
        assert torch.allclose(flat, whole.result.adapters.flat[0], rtol=0, atol=TOLERANCE)
        told = json.loads((tmp_path / f"told-{rank}.json").read_text())
        assert told == {"size": 2, "result": rank == 0, "steps": 8}, "the first process speaks, and has the result"
    assert json.loads((tmp_path / "trainer/peer/summary.json").read_text())["rounds"] == 4
