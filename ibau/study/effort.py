"""Equal effort: every defence gets the seconds that I-BAU takes on the same victim.

A defence's published schedule seldom fits into them. `settings.scaled(share)` is the same method with a share
of its published work, and `settings.work` says how much that is. Two short runs tell how the seconds depend
on the work, and so which share fits.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

PILOT = 0.15  # of the seconds: what the second of the two short runs is to take


@dataclass(frozen=True)
class Effort:
    """A defence's settings fitted into a time.

    settings  the scaled ones
    share     of the published work that they are; above 1 where there was time for more
    seconds   what they were to take
    pilot     of each short run: its work and its seconds
    """

    settings: object
    share: float
    seconds: float
    pilot: list[dict]

    def as_dict(self) -> dict:
        """For a record."""
        return asdict(self)


def fitted(published, seconds: float, run: Callable[[object], float]) -> Effort:
    """`published` settings scaled so that a run takes `seconds`, by the clock of `run(settings) -> seconds`.

    Seconds are taken to be a + b work. Where even the least that `scaled` gives takes longer, it is returned.
    Raises ValueError for settings that cannot be scaled.
    """
    if not hasattr(published, "scaled"):
        raise ValueError(f"{type(published).__name__} cannot be scaled; run this defence without an effort")
    least = published.scaled(0.0)
    pilot = [{"work": least.work, "seconds": run(least)}]
    if pilot[0]["seconds"] <= seconds / 4:
        share = _share(published, PILOT * seconds, pilot)
        longer = published.scaled(max(share, 2 * least.work / published.work))
        pilot.append({"work": longer.work, "seconds": run(longer)})
    chosen = published.scaled(_share(published, seconds, pilot))
    return Effort(chosen, chosen.work / published.work, seconds, pilot)


def _share(published, seconds: float, pilot: list[dict]) -> float:
    """The share of the published work that fits into `seconds`, by the short runs so far."""
    first, last = pilot[0], pilot[-1]
    slope, start = last["seconds"] / last["work"], 0.0
    if last["work"] > first["work"] and last["seconds"] > first["seconds"]:
        slope = (last["seconds"] - first["seconds"]) / (last["work"] - first["work"])
        start = max(0.0, last["seconds"] - slope * last["work"])
    return max(0.0, seconds - start) / slope / published.work
