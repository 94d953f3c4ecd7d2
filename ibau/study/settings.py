"""What makes a victim, the standard victims, and the profiles: how much to compute."""

from dataclasses import dataclass, replace

from ibau.attacks import ALL_TO_ALL, ATTACKS
from ibau.checks import known
from ibau.networks import models
from ibau.networks.training import TrainSettings


@dataclass(frozen=True)
class VictimSettings:
    """Everything that makes a victim model, but for the data set's own content and split.

    `attack` is one of ATTACKS, several of them joined by "+", each of which then has a target class of its
    own (`target`, target + 1, ... modulo the classes), or "none", which trains on clean data.
    """

    dataset: str = "mnist5k"
    attack: str = "badnets"
    target: int | str = 8  # the I-BAU authors' target class for BadNets; or "all-to-all"
    poison_ratio: float = 0.2  # share of the whole training set, the paper's; several triggers divide it
    strength: float | None = None  # of a single attack, see attacks.STRENGTHS; None: the attack's default
    architecture: str = "small_vgg"
    width: float = 1.0
    train_size: int | None = None  # None: the whole training set
    training: TrainSettings = TrainSettings()
    seed: int = 0

    def __post_init__(self):
        unknown = [name for name in self.attacks if name not in ATTACKS]
        if unknown:
            valid = f"none, {', '.join(ATTACKS)}, or several of these joined by +"
            raise ValueError(f"unknown attack {unknown[0]!r}; valid: {valid}")
        if self.strength is not None and len(self.attacks) != 1:
            raise ValueError(f"strength is of one attack; {self.attack!r} takes None")
        if len(self.attacks) > 1 and self.target == ALL_TO_ALL:
            raise ValueError(f"several attacks have a target class each; {ALL_TO_ALL!r} takes one attack")
        known("architecture", self.architecture, models.MODELS)
        if not self.attacks:  # nothing is poisoned, so all ratios share one model
            object.__setattr__(self, "poison_ratio", VictimSettings.poison_ratio)

    @property
    def attacks(self) -> tuple[str, ...]:
        """The names of the attacks; none for a clean model."""
        return () if self.attack == "none" else tuple(self.attack.split("+"))

    def targets(self, num_classes: int) -> tuple[int | str, ...]:
        """The target of each of the attacks."""
        if len(self.attacks) < 2:
            return (self.target,) * len(self.attacks)
        return tuple((self.target + i) % num_classes for i in range(len(self.attacks)))


@dataclass(frozen=True)
class Profile:
    """How much to compute; README.md describes the three."""

    dataset: str
    clean_size: int | None  # None: the data set's default, see splits.CLEAN_SIZE
    width: float
    training: TrainSettings


PROFILES = {
    "quick": Profile("mnist5k", 500, 0.5, TrainSettings(epochs=12, batch_size=32, lr=2e-3)),
    "desk": Profile("cifar10", 5000, 1.0, TrainSettings(epochs=5)),
    "paper": Profile("cifar10", 5000, 1.0, TrainSettings(epochs=50)),
}


# The standard victims: label -> attack and target. The targets are the I-BAU authors' where known.
STANDARD: dict[str, tuple[str, int | str]] = {
    "BadNets": ("badnets", 8),
    "Blend": ("blend", 1),
    "Trojan square": ("trojan_square", 2),
    "Trojan watermark": ("trojan_watermark", 2),
    "l0-inv": ("l0_inv", 0),
    "l2-inv": ("l2_inv", 0),
    "Smooth": ("smooth", 6),
    "all-to-all": ("badnets", ALL_TO_ALL),
    "seven triggers": ("+".join(ATTACKS), 0),
}


def standard_victims(effort: Profile, **other) -> dict[str, VictimSettings]:
    """The clean model and the STANDARD attacks at this effort; `other` settings hold for all of them."""
    common = {"dataset": effort.dataset, "width": effort.width, "training": effort.training, **other}
    attacked = {label: VictimSettings(attack=a, target=t, **common) for label, (a, t) in STANDARD.items()}
    return {"clean": VictimSettings(attack="none", target=0, **common), **attacked}


def profile(name: str, dataset: str = "") -> Profile:
    """The named profile, on another data set if `dataset` names one. Raises ValueError for an unknown one."""
    known("profile", name, PROFILES)
    chosen = PROFILES[name]
    if dataset and dataset != chosen.dataset:
        # The profile's effort stays; how many clean images there are to have is the data set's matter.
        chosen = replace(chosen, dataset=dataset, clean_size=None)
    return chosen
