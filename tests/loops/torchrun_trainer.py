"""What each process of torchrun does: one client's Trainer with PeerCallback under DDP.

torchrun --nproc-per-node 2 torchrun_trainer.py RUN.yaml FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from loop_rigs import read
from safetensors.torch import save_file
from test_trainer_peer import trained

from peerlora.config.loading import load_config


def main(yaml, folder):
    """The Trainer deals out the minibatches."""
    folder = Path(folder)
    torch.set_num_threads(1)
    # else losses are doubled, for models whose loss is a sum over num_items_in_batch: BERT's is a mean
    settings = {"ddp_backend": "gloo", "average_tokens_across_devices": False}
    callback, model, trainer = trained(load_config(yaml), folder, **settings)
    rank = dist.get_rank()
    save_file({"flat": read(model)}, folder / f"rank-{rank}.safetensors")
    told = {"size": callback.peer.driver.group.size, "result": callback.result is not None}
    (folder / f"told-{rank}.json").write_text(json.dumps(told | {"steps": trainer.state.global_step}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
