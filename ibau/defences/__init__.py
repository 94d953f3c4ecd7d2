"""The defences, behind one signature (see `base.Defence`):

    defended = defence("finetune")(model, clean, settings=quick("finetune"), seed=0)

A defence is added by adding it to DEFENCES: nothing downstream asks for one by its name.
"""

from ibau.checks import known
from ibau.cleaning.recipe import CleanSettings
from ibau.defences.base import Defence, Defended
from ibau.defences.deepinspect import DeepInspectSettings, deepinspect
from ibau.defences.dp_sgd import DPSGDSettings, dp_sgd
from ibau.defences.fine_pruning import FinePruningSettings, fine_pruning
from ibau.defences.finetune import FinetuneSettings, finetune
from ibau.defences.high_rate import HighRateSettings, high_rate
from ibau.defences.ibau import ibau, ibau_authors, ibau_plus
from ibau.defences.nad import NADSettings, nad
from ibau.defences.neural_cleanse import NeuralCleanseSettings, neural_cleanse
from ibau.defences.tabor import TaborSettings, tabor
from ibau.unlearning.authors import AuthorsSettings
from ibau.unlearning.ibau import IBAUSettings

__all__ = ["DEFENCES", "Defence", "Defended", "defence", "quick"]

DEFENCES: dict[str, Defence] = {
    "finetune": Defence("Fine-tuning", finetune, FinetuneSettings),
    "high_rate": Defence("Fine-tuning, high rate", high_rate, HighRateSettings),
    "nc": Defence("Neural Cleanse", neural_cleanse, NeuralCleanseSettings),
    "tabor": Defence("TABOR", tabor, TaborSettings),
    "deepinspect": Defence("DeepInspect", deepinspect, DeepInspectSettings, sees="nothing"),
    "fine_pruning": Defence("Fine-Pruning", fine_pruning, FinePruningSettings),
    "nad": Defence("NAD", nad, NADSettings),
    "dp_sgd": Defence("DP-SGD", dp_sgd, DPSGDSettings, sees="poisoned"),
    "ibau_authors": Defence("I-BAU (authors' recipe)", ibau_authors, AuthorsSettings),
    "ibau": Defence("I-BAU", ibau, IBAUSettings, version=2),  # 2: the step of Phi follows the curvature
    "ibau_plus": Defence("I-BAU+", ibau_plus, CleanSettings),
}


def defence(name: str) -> Defence:
    """The defence of this short name. Raises ValueError for an unknown one, listing the valid ones."""
    known("defence", name, DEFENCES)
    return DEFENCES[name]


def quick(name: str):
    """A defence's settings on a budget of seconds, for mnist5k; its defaults are the published ones."""
    settings = defence(name).settings
    return settings.quick() if hasattr(settings, "quick") else settings()
