"""The paper's I-BAU, to be read from top to bottom (`ibau.py`), and the authors' recipe (`authors.py`)."""
