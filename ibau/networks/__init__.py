"""The classifiers: their architectures, training, predictions and weight files."""
