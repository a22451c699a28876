"""
Label features of your own: arrays (N, d) and (K, d), here of the package's blurred digits.

    python examples/own_features.py
    python examples/own_features.py image_features.npy text_features.npy
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from transclip_fast import TransCLIP, load_features
from transclip_fast.demo import backbone, class_prompts, write_images
from transclip_fast.encode.folder import encode_source
from transclip_fast.encode.sources import open_source

labels = None
if sys.argv[1:]:
    X, T = (np.load(file) for file in sys.argv[1:])
else:
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / "images", "blur")
        source = open_source(images, labels_from_folders=True)
        encode_source(source, backbone(), Path(folder) / "features", class_prompts())
        features = load_features(Path(folder) / "features")
        X, T = features.get("image_features")[:], features.get("text_features")
        labels = np.asarray(features.get("labels"))

model = TransCLIP().fit(X, text_features=T)
print(f"{len(X)} rows, {len(T)} classes, {model.n_effective_classes_:.1f} of them in use")
print(f"{(model.transduction_ != model.zero_shot_labels_).sum()} labels differ from zero-shot")
print(f"estimated accuracy {model.calibrated_confidences_.mean():.0%}, often too high")
if labels is not None:
    before = (model.zero_shot_labels_ == labels).mean()
    print(f"accuracy: zero-shot {before:.1%}, jointly {(model.transduction_ == labels).mean():.1%}")
print("a new row:", model.predict_proba(X[:1]).round(3)[0])
