"""What a topology promises, and what a method may ask for."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Properties:
    """Promises about every mixing matrix W of a run; as a method's requirement, only the true ones count."""

    symmetric: bool = False
    row_stochastic: bool = False
    column_stochastic: bool = False
    static: bool = False
    neighbours_only: bool = False
    """False where W reaches beyond this round's neighbours, which real peers cannot do."""
    period: int | None = None
    """Rounds after which the same matrices come again: 1 where W is static, None where rounds are drawn.  Told, never
    required."""

    @property
    def doubly_stochastic(self) -> bool:
        """Rows and columns both sum to 1, so mixing keeps the mean over clients."""
        return self.row_stochastic and self.column_stochastic

    def missing(self, offered: "Properties") -> list[str]:
        """The names of what is required here and not offered there."""
        names = [field.name for field in fields(self) if field.name != "period"]
        return [name.replace("_", " ") for name in names if getattr(self, name) and not getattr(offered, name)]
