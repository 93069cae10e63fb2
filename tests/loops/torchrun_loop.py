"""What each process of torchrun does: one client's plain loop under DDP, which may be ended early and go on later.

torchrun --nproc-per-node 2 torchrun_loop.py RUN.yaml FOLDER FIRST LAST: takes the local steps FIRST to LAST - 1.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from loop_rigs import alone, batches, optimizer_of, peft_model, read, take_steps
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from peerlora.config.loading import load_config
from peerlora.runtime.compose import compose


class Ended(Exception):
    """The loop is broken off, as by a kill."""


def main(yaml, folder, first, last):
    """Both processes see the same rows, so that the mean of their gradients is that of one process."""
    folder, first, last = Path(folder), int(first), int(last)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    config = load_config(yaml)
    federation = compose(config)
    model = peft_model(config, federation)
    kept = folder / f"loop-{rank}.safetensors"
    if first:  # the loop's own checkpoint, of a moment within a round
        model.load_state_dict(load_file(kept), strict=False)
    wrapped, optimizer = DistributedDataParallel(model), optimizer_of(config, model)
    rows = batches(config, federation, 0)[first:last]
    options = {"steps": first, "options": {"resume": True}} if first else {}
    try:
        with alone(config, folder, wrapped, optimizer, **options) as peer:
            assert peer.driver.group.size == 2
            begun = peer.driver._taken
            take_steps(peer, wrapped, optimizer, config, federation, rows)
            if not peer.over:
                raise Ended
    except Ended:
        save_file(
            {name: value for name, value in model.state_dict().items() if "lora_" in name or "modules_to_save" in name},
            kept,
        )
    save_file({"flat": read(model)}, folder / f"rank-{rank}.safetensors")
    (folder / f"begun-{rank}.json").write_text(json.dumps(begun))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
