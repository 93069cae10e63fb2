"""The order in which bitsandbytes keeps weights of 4 bits."""

from __future__ import annotations

from typing import Any

from peerlora.errors import ModelError

_SWITCH = "support_avx512bf16_for_cpu"  # of a Linear4bit
_REORDERED = "original_qshape"  # of its quantisation's state, from the first time on that it is re-ordered


def keep_weight_order(model: Any) -> None:
    """Keep the weights of 4 bits in the order in which they were loaded.

    Else bitsandbytes re-orders them, on processors with AVX512-BF16, in the first forward pass in evaluation mode
    without gradients.  That rounds their scales, and ``state_dict``, which PEFT calls to read an adapter, does not undo
    it: the base would be another than its neighbours' and than it was.  Raises ModelError where it has happened.
    """
    for name, module in model.named_modules():
        if hasattr(module, _SWITCH):
            if hasattr(getattr(module.weight, "quant_state", None), _REORDERED):
                raise ModelError(
                    f"bitsandbytes has re-ordered the weights of {name} for this processor and rounded their scales, "
                    "in a forward pass in evaluation mode; load the base anew, and join before the first such pass"
                )
            setattr(module, _SWITCH, False)
