"""How many clients share one graph: enough tokens for efficient products, not more than caches or memory hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

PACKED_TOKENS = 2000  # tokens; flat from about 1,000 to 4,000 real tokens: docs/decisions/0009
PADDED_TOKENS = 512  # tokens; padding grows with the clients that share a graph: docs/decisions/0006
DECODED_TOKENS = 512  # tokens; a decoder's many layers keep megabytes of each
_KEPT = 17  # numbers that a transformer block keeps per token and hidden unit for backward (Korthikanti et al. 2022)
_SHARE = 0.6  # share of the free memory of a GPU; the rest is for gradients, logits and the allocator


@dataclass(frozen=True)
class GraphSize:
    """The tokens that one graph should hold, and whether padding counts among them."""

    tokens: int
    padded: bool

    @staticmethod
    def of_gpu(free_bytes: int, blocks: int, width: int, bytes_per_number: int, vocabulary: int = 0) -> GraphSize:
        """What fits into a GPU's memory beside the model: there, larger is faster.

        ``vocabulary``: of a language model, whose logits in fp32 are kept four times over by loss and gradient.
        """
        per_token = blocks * width * _KEPT * bytes_per_number + 4 * 4 * vocabulary
        return GraphSize(max(1, int(_SHARE * free_bytes) // per_token), padded=True)

    def clients(self, batch: int, lengths: Int[np.ndarray, " row"]) -> int:
        """How many clients with ``batch`` rows of such lengths make one graph; at least one."""
        typical = np.percentile(lengths, 90) if self.padded else np.mean(lengths)
        return max(1, self.tokens // max(1, batch * int(typical)))
