"""The classifiers: their architectures, training, predictions and weight files. An attack's poisoned data
makes one a victim; a defence gets that victim to clean."""
