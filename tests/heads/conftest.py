"""Small problems and short trainings; one thread, since threads that wait cost most of the time."""

from __future__ import annotations

import numpy as np
import pytest

from transclip_fast.heads import clip_adapter, task_res, tip_adapter_f, unmix_clip


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture
def task(problem):
    """Arrays of a FEATURES file with 8 shots and 4 validation rows a class."""
    features, text, labels = problem(n=400, noise=0.06)
    order = np.argsort(labels, kind="stable")
    place = np.concatenate([np.arange(n) for n in np.bincount(labels)])
    groups = {"support": place < 8, "validation": (place >= 8) & (place < 12), "image": place >= 12}
    arrays = {"text_features": text}
    for name, chosen in groups.items():
        arrays[f"{name}_features"] = features[order[chosen]]
        arrays[f"{name}_labels"] = labels[order[chosen]]
    arrays["labels"] = arrays.pop("image_labels")
    return arrays


@pytest.fixture
def short(monkeypatch):
    """Trainings that are over soon, for what does not depend on their length."""
    for head in (tip_adapter_f, clip_adapter, unmix_clip, task_res):
        monkeypatch.setattr(head, "EPOCHS", 10)
