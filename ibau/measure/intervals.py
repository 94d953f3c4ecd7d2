"""A rate with its 95% Wilson interval, of one count or pooled over several."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from torch import Tensor


@dataclass(frozen=True)
class Rate:
    """A share `value` of `n` images, with its 95% Wilson interval [low, high]."""

    value: float
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, hits: Tensor) -> "Rate":
        """The share of true entries. Raises ValueError when there is nothing to count."""
        n = hits.numel()
        if n == 0:
            raise ValueError("a rate over no images at all: every image was excluded")
        return cls._wilson(hits.float().mean().item(), n)

    @classmethod
    def pooled(cls, rates: Sequence["Rate"]) -> "Rate":
        """One rate over all that these were counted on."""
        n = sum(rate.n for rate in rates)
        return cls._wilson(sum(rate.value * rate.n for rate in rates) / n, n)

    @classmethod
    def _wilson(cls, p: float, n: int) -> "Rate":
        z = 1.959964
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        # At p = 0 or 1 the interval touches p; rounding must not push it past.
        return cls(p, n, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] (n = {self.n})"
