"""
Try several methods on the same features: accuracy on each half of them.

    python examples/compare_methods.py

The package's digits with thin strokes; the same on the command line is `transclip-fast compare`.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from transclip_fast import TransCLIP, build_graph, load_features
from transclip_fast.demo import backbone, class_prompts, write_images
from transclip_fast.encode.folder import encode_source
from transclip_fast.encode.sources import open_source
from transclip_fast.methods import LaplacianShot, StatA, ZeroShot, ZLaP

with tempfile.TemporaryDirectory() as folder:
    images = write_images(Path(folder) / "images", "thin strokes")
    source = open_source(images, labels_from_folders=True)
    encode_source(source, backbone(), Path(folder) / "features", class_prompts())
    features = load_features(Path(folder) / "features")
    X, T = np.asarray(features.get("image_features")[:]), features.get("text_features")
    labels = np.asarray(features.get("labels"))

graph = build_graph(X, 10)  # for all methods; each takes as many neighbours as it wants
half = np.random.default_rng(0).random(len(X)) < 0.5
methods = {
    "zero-shot": ZeroShot(),
    "TransCLIP": TransCLIP(),
    "StatA": StatA(),
    "LaplacianShot, texts as shots": LaplacianShot(anchors="texts"),
    "ZLaP": ZLaP(),
}
print(f"{'method':30} {'one half':>9} {'the other':>9}   seconds")
for name, method in methods.items():
    began = time.perf_counter()
    right = method.fit(X, text_features=T, graph=graph).transduction_ == labels
    seconds = time.perf_counter() - began
    print(f"{name:30} {right[half].mean():9.1%} {right[~half].mean():9.1%} {seconds:9.2f}")
