"""Make a trigger, poison a training set. `ATTACKS`: an attack's short name -> the function that makes it."""

import inspect

from ibau.attacks.badnets import badnets
from ibau.attacks.blend import blend
from ibau.attacks.invisible import l0_inv, l2_inv
from ibau.attacks.poisoning import ALL_TO_ALL, Poisoned, poison, poison_several, target_labels
from ibau.attacks.smooth import smooth
from ibau.attacks.trigger import Trigger
from ibau.attacks.trojan import trojan_square, trojan_watermark
from ibau.checks import known

ATTACKS = {
    "badnets": badnets,
    "blend": blend,
    "trojan_square": trojan_square,
    "trojan_watermark": trojan_watermark,
    "l0_inv": l0_inv,
    "l2_inv": l2_inv,
    "smooth": smooth,
}
STRENGTHS = {  # an attack -> the input of its function that makes it stronger and easier to see
    "badnets": "size",  # pixels of the square's side
    "blend": "alpha",  # opacity
    "trojan_square": "size",  # pixels of the square's side
    "trojan_watermark": "width",  # of its strokes, the image being 2 wide
    "l0_inv": "pixels",
    "l2_inv": "norm",
    "smooth": "peak",
}
OFFERED = ("model", "images", "labels", "target", "seed")  # what an attack may take from an experiment


def strength_of(attack: str, strength: float | None) -> dict[str, float]:
    """The input by which `make_trigger` gives the named attack this strength; none for its default.

    A trigger's own strength is in its settings, under the same name. Raises ValueError for an unknown
    attack, or a fraction where pixels are counted.
    """
    _attack(attack)
    if strength is None:
        return {}
    whole = STRENGTHS[attack] in ("size", "pixels")
    if whole and not float(strength).is_integer():
        raise ValueError(f"{STRENGTHS[attack]} of {attack!r} is {strength}; it must be a whole number")
    return {STRENGTHS[attack]: int(strength) if whole else float(strength)}


def needs_model(attack: str) -> bool:
    """Is this attack's trigger optimised against a clean model?"""
    return "model" in inspect.signature(_attack(attack)).parameters


def make_trigger(attack: str, image_size: int, **inputs) -> Trigger:
    """Make the named attack's trigger for square images of `image_size` pixels.

    `inputs` offers what an attack may use: model (a clean one), images, labels, target, seed. Each attack
    takes those that its own function names. Other inputs are its strengths, such as alpha for "blend".
    Raises ValueError for an unknown attack, or a strength it does not have.
    """
    make = _attack(attack)
    wanted = [name for name in inspect.signature(make).parameters if name != "image_size"]
    strange = [name for name in inputs if name not in wanted and name not in OFFERED]
    if strange:
        raise ValueError(f"attack {attack!r} has no setting {', '.join(strange)}; valid: {', '.join(wanted)}")
    return make(image_size, **{name: value for name, value in inputs.items() if name in wanted})


def _attack(name: str):
    known("attack", name, ATTACKS)
    return ATTACKS[name]


__all__ = [
    "ALL_TO_ALL",
    "ATTACKS",
    "STRENGTHS",
    "Poisoned",
    "Trigger",
    "make_trigger",
    "needs_model",
    "poison",
    "poison_several",
    "strength_of",
    "target_labels",
]
