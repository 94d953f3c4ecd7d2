"""What the grid computes: cells, and the sweeps of the paper, which are sets of cells.

choose(["clean-size"], "quick", seeds=3, sizes=[500, 100])
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

from ibau import defences
from ibau.attacks import ATTACKS
from ibau.data.splits import CLEAN_SIZE
from ibau.study.settings import STANDARD, VictimSettings, standard_victims
from ibau.study.settings import profile as profile_of

NONE = "none"  # no defence: the cell's record is the victim's


class GridError(Exception):
    """The grid cannot be run as asked; the message names the value and the valid ones."""


@dataclass(frozen=True)
class Cell:
    """One record of the grid: a victim, and the defence it gets. Raises ValueError for an unknown defence."""

    victim: VictimSettings
    defence: str = NONE  # or one of DEFENCES
    settings: object = None  # of the defence; None: its defaults
    clean_size: int | None = None  # the defender's images; None: the data set's default, see CLEAN_SIZE
    seed: int = 0  # of the defence
    effort: float = 0.0  # times I-BAU's seconds, see `experiment.defence_record`; 0: the settings as they are

    def __post_init__(self):
        if self.defence != NONE and self.settings is None:
            object.__setattr__(self, "settings", defences.defence(self.defence).settings())

    def __str__(self) -> str:
        about = self.victim
        words = [about.dataset, about.attack if len(about.attacks) < 2 else f"{len(about.attacks)} triggers"]
        if about.attacks:
            words.append(f"to {about.target}, {about.poison_ratio:.1%} poisoned")
        words.append("| undefended" if self.defence == NONE else f"| {self.defence}")
        if self.defence != NONE and self.clean_size:
            words.append(f"with {self.clean_size} clean images")
        if self.effort:
            words.append(f"in {self.effort:g} times I-BAU's seconds")
        return " ".join([*words, f"| seed {self.victim.seed}"])


# ---- the sweeps

REAL = ("cifar10", "gtsrb")  # the paper's data sets
RATIOS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # shares of the training set that are poisoned
SIZES = (5000, 2500, 1000, 500, 250, 100)  # clean images
# A patch, a whole picture and an optimised trigger, where all attacks are too many:
THREE = ("BadNets", "Blend", "l2-inv")
MULTI = ("all-to-all", "seven triggers")
SINGLE = tuple(label for label in STANDARD if label not in MULTI)
UNMIRRORED = ("mnist5k", "gtsrb")  # a mirrored digit or road sign is another one, or none


@dataclass(frozen=True)
class Sweep:
    """No defence and every defence, against standard victims, as the poison or the clean set varies."""

    victims: tuple[str, ...]  # their labels
    ratios: tuple[float, ...] = (VictimSettings.poison_ratio,)
    sizes: tuple[int, ...] = ()  # clean images, as far as the profile has so many; (): what it has

    def cells(self, profile: str, dataset: str = "", seeds: Sequence[int] = (0,)) -> list[Cell]:
        """The cells at this profile, on another data set if `dataset` names one."""
        chosen = profile_of(profile, dataset)
        settings = {name: settings_for(name, profile, chosen.dataset) for name in defences.DEFENCES}
        most = chosen.clean_size or CLEAN_SIZE[chosen.dataset]
        return [
            Cell(standard_victims(chosen, seed=seed, poison_ratio=ratio)[label], name, about, size, seed)
            for size in [size for size in self.sizes if size <= most] or [chosen.clean_size]
            for ratio in self.ratios
            for seed in seeds
            for label in self.victims
            for name, about in ((NONE, None), *settings.items())
        ]


SWEEPS = {
    "single-target": Sweep(("clean", *SINGLE)),  # C6: seven attacks, and what it costs on a clean model
    "multi-target": Sweep(MULTI),  # C6: several classes are targets
    "poison-ratio": Sweep(THREE, ratios=RATIOS),  # C7
    "clean-size": Sweep(THREE, sizes=SIZES),  # C7, C9
}


def choose(
    sweeps: Sequence[str],
    profile: str,
    dataset: str = "",
    seeds: int = 1,
    *,
    first: int = 0,
    attacks: Sequence[str] = (),
    only: Sequence[str] = (),
    ratios: Sequence[float] = (),
    sizes: Sequence[int] = (),
) -> list[Cell]:
    """The cells of these sweeps with `seeds` seeds from `first` on, each once; no sweep: of all.

    `attacks` and `only`, if any are named, leave out the cells of other attacks and other defences; "none" is
    among both. `ratios`, poisoned shares in (0, 1), and `sizes`, numbers of clean images, do the same. Raises
    GridError for a name, ratio or size that no cell of the sweeps has.
    """
    _check("sweep", sweeps, SWEEPS)
    _check("attack", attacks, (NONE, *ATTACKS))
    _check("defence", only, (NONE, *defences.DEFENCES))
    if seeds < 1:
        raise GridError(f"{seeds} seeds; there must be at least 1")
    chosen = range(first, first + seeds)
    cells = [cell for name in sweeps or SWEEPS for cell in SWEEPS[name].cells(profile, dataset, chosen)]
    shares = sorted({cell.victim.poison_ratio for cell in cells if cell.victim.attacks})
    _check("poison ratio", ratios, shares)
    _check("clean size", sizes, sorted({cell.clean_size for cell in cells if cell.clean_size}))
    return [
        cell
        for cell in dict.fromkeys(cells)
        if (not attacks or cell.victim.attack in attacks)
        and (not only or cell.defence in only)
        and (not ratios or cell.victim.poison_ratio in ratios)
        and (not sizes or cell.clean_size in sizes)
    ]


def _check(what: str, given: Sequence, valid: Iterable) -> None:
    for one in given:
        if one not in valid:
            raise GridError(f"no {what} {one!r}; there are {', '.join(map(str, valid))}")


def settings_for(defence: str, profile: str, dataset: str):
    """A defence's settings at a profile: those of its class's method of that name, else its defaults.

    They mirror no images of data sets where that makes them another class.
    """
    cls = defences.defence(defence).settings
    settings = getattr(cls, profile, cls)()
    return _unmirrored(settings) if dataset in UNMIRRORED else settings


def _unmirrored(settings):
    changed = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == "crop-flip":
            changed[field.name] = "crop"
        elif is_dataclass(value):
            changed[field.name] = _unmirrored(value)
    return replace(settings, **changed)
