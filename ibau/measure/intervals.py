"""A rate with its 95% Wilson interval, of one count or pooled over several."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from torch import Tensor

Z = 1.959964  # of a 95% interval


def wilson(p: float, n: int, z: float = Z) -> tuple[float, float]:
    """The Wilson score interval (1927) of a share `p` of `n`, `z` standard errors wide, within [0, 1]."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At p = 0 or 1 the interval touches p; rounding must not push it past.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


@dataclass(frozen=True)
class Rate:
    """`hits` of `n` images: `value`, the share, and `low` to `high`, its 95% Wilson interval.

    Raises ValueError when there is nothing to count.
    """

    hits: int
    n: int

    def __post_init__(self):
        if self.n == 0:
            raise ValueError("a rate over no images at all: every image was excluded")

    @classmethod
    def of(cls, hits: Tensor) -> "Rate":
        """The true entries among all. Raises ValueError when there is nothing to count."""
        return cls(int(hits.sum()), hits.numel())

    @classmethod
    def pooled(cls, rates: Sequence["Rate"]) -> "Rate":
        """One rate over all that these were counted on."""
        return cls(sum(rate.hits for rate in rates), sum(rate.n for rate in rates))

    @classmethod
    def read(cls, recorded: dict) -> "Rate":
        """The rate that `as_dict` wrote into a record."""
        return cls(recorded["hits"], recorded["n"])

    @property
    def value(self) -> float:
        return self.hits / self.n

    @property
    def low(self) -> float:
        return wilson(self.value, self.n)[0]

    @property
    def high(self) -> float:
        return wilson(self.value, self.n)[1]

    def as_dict(self) -> dict:
        """For a record: hits and n, and for its readers what follows from them."""
        return {"hits": self.hits, "n": self.n, "value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] (n = {self.n})"
