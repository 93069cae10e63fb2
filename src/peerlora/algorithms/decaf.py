"""DeCAF: agree on the product of the factors, then factor it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.gossip import FactorGossip
from peerlora.algorithms.traits import Traits
from peerlora.exchange.product_average import averaged_products
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class DeCAF(FactorGossip):
    """K local steps on A and B, then ``s_i B_i A_i <- SVD_r(sum_j W_ij s_j B_j A_j)``.

    Source: "DeCAF", arXiv 2505.21382 (consensus on the product, truncated SVD, local step: as in the paper).
    Differs (all ours): a round ends with the consensus, so that what is evaluated has been exchanged, as with the
    other methods here; the cycle is the paper's, whose first consensus meets B = 0 and changes nothing.  The factors
    are balanced, ``B = U sqrt(S)``, ``A = sqrt(S) V^T``.  Each client's own alpha/rank s is part of the product, so
    ranks may differ.  Directions that the averaged product lacks keep the client's own rows of A and get B = 0: with
    both zero they could never train again.  Coordinates change every round, so the optimiser must start afresh.
    """

    traits: ClassVar = Traits(
        source="DeCAF, arXiv 2505.21382",
        mixes="A and B, as products",
        operator="sum-product",
        sends="models",
        sends_gradients=False,
        requires=Properties(row_stochastic=True, column_stochastic=True, neighbours_only=True),
        unequal_ranks=None,
        fresh_optimizer="the factors are factored anew after every exchange",
        own_gauge=True,
    )

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        return peers.combine(learner.fit(x, "AB"), averaged_products)
