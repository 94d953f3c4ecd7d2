"""Backdoor attacks on image classifiers, and their removal by I-BAU."""

__version__ = "0.1.0"
__all__ = ["IBAUSettings", "__version__", "unlearn"]


def __getattr__(name):
    # Imported on first use: `ibau --help` need not wait for torch.
    if name in ("IBAUSettings", "unlearn"):
        from ibau.cleaning import recipe

        return getattr(recipe, name)
    raise AttributeError(f"module 'ibau' has no attribute {name!r}")
