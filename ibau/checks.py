"""One form for the errors about settings: each names the setting, its value, and what would be right."""

from collections.abc import Iterable


def positive(settings, *names: str) -> None:
    """Raise ValueError where a setting of these names is not above 0."""
    for name in names:
        _require(getattr(settings, name) > 0, settings, name, "be positive")


def not_negative(settings, *names: str) -> None:
    """Raise ValueError where a setting of these names is below 0."""
    for name in names:
        _require(getattr(settings, name) >= 0, settings, name, "not be negative")


def within(settings, interval: str, *names: str) -> None:
    """Raise ValueError where a setting of these names lies outside an interval such as "(0, 1]"."""
    low, high = map(float, interval[1:-1].split(","))
    for name in names:
        value = getattr(settings, name)
        above = value > low if interval[0] == "(" else value >= low
        below = value < high if interval[-1] == ")" else value <= high
        _require(above and below, settings, name, f"lie in {interval}")


def one_of(settings, name: str, valid: Iterable) -> None:
    """Raise ValueError where the setting of this name is none of the valid values."""
    if getattr(settings, name) not in valid:
        raise ValueError(f"{name} is {getattr(settings, name)!r}; valid: {', '.join(map(str, valid))}")


def known(kind: str, name: str, valid: Iterable[str]) -> None:
    """Raise ValueError where nothing of this kind (an attack, a defence, ...) has this name."""
    if name not in valid:
        raise ValueError(f"unknown {kind} {name!r}; valid: {', '.join(valid)}")


def _require(holds: bool, settings, name: str, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {getattr(settings, name)}; it must {wanted}")
