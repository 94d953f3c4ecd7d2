"""Backdoor attacks on image classifiers, and their removal.

`ibau.unlearn` is the paper's I-BAU, `ibau.clean` is I-BAU+, ours.
"""

__version__ = "0.1.0"
__all__ = ["CleanSettings", "IBAUSettings", "__version__", "clean", "unlearn"]

# Imported on first use: `ibau --help` need not wait for torch.
_HOMES = {
    "IBAUSettings": "ibau.unlearning.ibau",
    "unlearn": "ibau.unlearning.ibau",
    "CleanSettings": "ibau.cleaning.recipe",
    "clean": "ibau.cleaning.recipe",
}


def __getattr__(name):
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ibau' has no attribute {name!r}")
