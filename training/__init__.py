"""Trains the bundled model from nothing on one GPU: ``python -m training.train``. See docs/tiny-model.md."""
