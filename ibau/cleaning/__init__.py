"""I-BAU+, ours, which goes beyond the paper: what it looks for (`perturbations.py`), how (`recipe.py`)."""
