"""Fixtures of several test files."""
import pytest
import torch

from utils import datasets


@pytest.fixture
def mirrored_digits(monkeypatch):
    """Digits may be mirrored, for tests of --tta that look at nothing else."""
    monkeypatch.setitem(datasets.DATASETS, 'digits', datasets.DATASETS['digits']._replace(flip=True))


@pytest.fixture
def few_digits(monkeypatch):
    """Every data set is its first 80 images, and no picture is drawn."""
    load = datasets.load
    monkeypatch.setattr(datasets, 'load', lambda *args: load(*args).subset(torch.arange(80)))
    monkeypatch.setattr('utils.run.plot_log', lambda *args: None)
    monkeypatch.setattr('utils.metrics.write_confusion', lambda *args: None)
