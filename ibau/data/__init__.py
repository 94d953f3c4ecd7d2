"""A name or a folder in, train / clean / heldout / test images out: see `load`."""

from ibau.data.folders import load_folder, save_folder
from ibau.data.images import DataError, ImageSet, Splits
from ibau.data.splits import CLEAN_SIZE, DATASETS, load

__all__ = ["CLEAN_SIZE", "DATASETS", "DataError", "ImageSet", "Splits", "load", "load_folder", "save_folder"]
