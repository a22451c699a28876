"""What every test shares: golden data and small problems."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import tiny_backbone

WHURS19 = ("rn50", "vit-b-32", "vit-l-14")


@pytest.fixture(scope="module")
def one_thread():
    """Small problems; threads that wait for each other cost most of the time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden_dir():
    """Folder of the golden data, named by TRANSCLIP_GOLDEN."""
    folder = os.environ.get("TRANSCLIP_GOLDEN")
    if not folder:
        pytest.skip("TRANSCLIP_GOLDEN does not name the golden data")
    return Path(folder)


@pytest.fixture(params=WHURS19)
def golden(request, golden_dir):
    """One golden WHU-RS19 file: features, labels and the published code's assignments."""
    with np.load(golden_dir / f"whurs19_clip_{request.param}.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture
def problem():
    """Maker of small float32 problems, `make_problem`."""
    return make_problem


def make_problem(n=77, k=6, d=33, seed=0, noise=0.03):
    """A small float32 problem: features (N, d), prototypes (K, d), labels (N,)."""
    # Soft enough that every step, parameter and prior moves the assignments.
    rng = np.random.default_rng(seed)
    prototypes = unit(0.15 * rng.normal(size=(k, d)) + 1)
    labels = rng.integers(k, size=n)
    centres = unit(prototypes + 0.4 * unit(rng.normal(size=(k, d))))
    features = unit(centres[labels] + noise * rng.normal(size=(n, d)))
    return features.astype(np.float32), prototypes.astype(np.float32), labels


def balanced(labels, shots):
    """Rows with so many of each class, classes in turn."""
    return np.concatenate([np.flatnonzero(labels == k)[:shots] for k in range(labels.max() + 1)])


def unit(rows):
    """Rows scaled to unit norm."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def pets(problem, tmp_path):
    """Maker of an .npz with pools of 60 support and 30 validation rows; keywords replace arrays."""

    def make(name="pets", k=6, **changes):
        features, text, labels = problem(n=167, k=k, noise=0.06)
        arrays = {"image_features": features[90:], "labels": labels[90:], "text_features": text}
        for pool, rows in (("support", slice(0, 60)), ("validation", slice(60, 90))):
            arrays |= {f"{pool}_features": features[rows], f"{pool}_labels": labels[rows]}
        kept = {key: array for key, array in {**arrays, **changes}.items() if array is not None}
        np.savez(tmp_path / f"{name}.npz", **kept)
        return str(tmp_path / f"{name}.npz")

    return make


@pytest.fixture
def backbone():
    return tiny_backbone()


@pytest.fixture
def images(tmp_path):
    """Maker of a folder of PNG files in two sub-folders; returns the folder."""

    def make(number=7, seed=0):
        draw = np.random.default_rng(seed)
        for i in range(number):
            file = tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(file)
        return tmp_path / "images"

    return make
