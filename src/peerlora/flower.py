"""A bridge to Flower: a PEFT model's adapter as the arrays of a ClientApp, and back.

The same model and loop can be a client of a Flower server in one run, and a peer without a server in the next.
"""

from __future__ import annotations

from typing import Any

import torch

from peerlora.errors import ExtraMissing
from peerlora.lora.peft_model import PeftAdapter


def to_arrays(model: Any, private_head: bool = False) -> Any:
    """A ``flwr.app.ArrayRecord`` of what a peer would exchange: A, B and, unless private, modules in full.

    By the names in PEFT's state dict, in fp32 or better.  Raises ModelError as ``peerlora.join``, ExtraMissing without
    Flower.
    """
    try:
        from flwr.app import Array, ArrayRecord  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ExtraMissing(
            "the bridge to Flower needs the package flwr, which is not installed; pip install flwr, in an environment "
            "of its own where its requirements differ from peerlora's"
        ) from None
    tensors = PeftAdapter(model, private_head).tensors()
    return ArrayRecord({name: Array(value.numpy()) for name, value in tensors.items()})


def put_arrays(model: Any, arrays: Any, private_head: bool = False) -> None:
    """Put an ArrayRecord that ``to_arrays`` made, or a server's average of such, into the model.

    Raises ModelError where names, shapes or values are not those of the model's adapter.
    """
    tensors = {name: torch.from_numpy(value.numpy().copy()) for name, value in arrays.items()}
    PeftAdapter(model, private_head).put_tensors(tensors)
