"""What the commands of README, docs and --help find in their folder, and how tests run them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.conftest import balanced
from transclip_fast import demo
from transclip_fast.demo.data import CLASS_NAMES, SHIFTS, digits, enlarge
from transclip_fast.encode.folder import encode_source
from transclip_fast.encode.sources import open_source
from transclip_fast.encode.text import ClassPrompts
from transclip_fast.store.features import load_features

STARTS = re.compile(r"^(torchrun( --[\w-]+ \w+)+ -m transclip_fast.cli|transclip-fast) (?=\w)")
IMAGES_PER_CLASS = 20
MODEL = "--model ViT-B-32 --pretrained openai"  # which the fixture of the tests replaces
NOT_RUN = {
    "demo": "tests/cli/test_run.py runs it whole",
    "convert": "needs a checkpoint of EVA-CLIP-8B; tests/cli/test_convert.py has a small one",
}
DIGITS = ["--templates", "digits.txt", "--workers", "0"]  # which is all that the demo's model reads
ADDED = {
    "run": DIGITS,
    "encode": DIGITS,
    "train-map": ["--workers", "0"],
    "evaluate-pairs": ["--workers", "0"],
}
MADE_BY_COMMANDS = f"""
transclip-fast run photos --classes names.txt {MODEL} --out out
transclip-fast graph features --out graph --index Flat --save-index image.index
transclip-fast solve features.npz --out result
transclip-fast train-head coop pets --shots 2 --out coop.safetensors
transclip-fast solve out/features --corrections corrections.csv --out result2
"""


def commands(code):
    """The words of every command of ours in lines of shell; those of torchrun as one process."""
    for line in re.sub(r"\\\n\s*", "", code).splitlines():
        for part in line.split("&&"):
            text = part.strip()
            if STARTS.match(text):
                yield shlex.split(STARTS.sub("", text), comments=True)


def make(folder, run):
    """Write every file and folder that the documents name, from some digits of the demo."""
    images, labels = digits()
    for row in balanced(labels, IMAGES_PER_CLASS):
        file = folder / "photos" / CLASS_NAMES[labels[row]] / f"{row:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(SHIFTS["blur"](enlarge(images[row]))).save(file)
    for name in ("names.txt", "classes-of-a.txt"):
        (folder / name).write_text("".join(f"{name}\n" for name in CLASS_NAMES))
    (folder / "digits.txt").write_text("a photo of the digit {}.\n")
    _write_splits(folder)
    _write_pairs(folder)
    prompts = ClassPrompts([*CLASS_NAMES], [[f"a photo of a {x}."] for x in CLASS_NAMES], "simple")
    source = open_source(folder / "photos", labels_from_folders=True)
    encode_source(source, demo.backbone(), folder / "features", prompts)
    for name in ("pets", "dtd", "imagenet"):
        for part in ("train", "val", "test"):
            shutil.copytree(folder / "features", folder / name / part)
    _write_arrays(folder, load_features(folder / "features"))
    for words in commands(MADE_BY_COMMANDS):
        run(words)


def _write_splits(folder):
    (folder / "oxford_pets").mkdir()
    entries = []
    for file in sorted((folder / "photos").rglob("*.png")):
        name = file.parent.name
        copy = shutil.copy(file, folder / "oxford_pets" / f"{name}_{file.name}")
        entries.append([Path(copy).name, CLASS_NAMES.index(name), name])
    parts = {name: entries[place::3] for place, name in enumerate(("train", "val", "test"))}
    (folder / "split_zhou_OxfordPets.json").write_text(json.dumps(parts))


def _write_pairs(folder):
    entries = []
    for place, name in enumerate(CLASS_NAMES):
        for file in sorted((folder / "photos" / name).iterdir()):
            other = CLASS_NAMES[(place + 1) % len(CLASS_NAMES)]
            captions = {"caption": name, "negative": other}
            captions = {key: f"a photo of the digit {x}." for key, x in captions.items()}
            entries.append({"image": f"{name}/{file.name}", **captions, "group": name})
    (folder / "pairs.json").write_text(json.dumps(entries))
    lines = ["image,caption,negative", *(",".join([*entry.values()][:3]) for entry in entries)]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")


def _write_arrays(folder, features):
    names = "image_features", "text_features", "labels"
    images, texts, labels = (np.array(features.get(name)) for name in names)
    shots = balanced(labels, 16)
    rows, classes = images[shots], labels[shots]
    data = dict(zip(names, (images, texts, labels), strict=True))
    data |= {"support_features": rows, "support_labels": classes}
    data["class_names"] = np.array(CLASS_NAMES)
    for name in ("features", "more"):
        np.savez(folder / f"{name}.npz", **data)
    data |= {"validation_features": rows, "validation_labels": classes}
    for name in ("pets", "dtd", "imagenet", "imagenet-v2", "imagenet-a"):
        np.savez(folder / f"{name}.npz", **data)
    known = np.where(np.arange(len(labels)) % 10, -1, labels)
    arrays = {"images": images, "image_features": images, "text": texts, "text_features": texts}
    arrays |= {"shots": rows, "y": classes, "labels": labels, "checked": known}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "labels.csv").write_text(
        "".join(f"{x}\n" for x in ["label", *(CLASS_NAMES[k] for k in labels)])
    )
    rows_of_csv = [f"{features.keys[row]},{CLASS_NAMES[labels[row]]}\n" for row in range(5)]
    (folder / "corrections.csv").write_text("".join(["key,label\n", *rows_of_csv]))
    torch.save(torch.from_numpy(texts), folder / "text.pt")
    (folder / "caches/dtd").mkdir(parents=True)
    one_hot = np.eye(len(CLASS_NAMES), dtype=np.float32)[classes]
    caches = {"test_f": images, "test_l": labels}
    caches |= {"keys_16shots": np.ascontiguousarray(rows.T), "values_16shots": one_hot}
    for name, array in caches.items():
        torch.save(torch.from_numpy(array), folder / f"caches/dtd/{name}.pt")


def variables(folder):
    """The names that snippets of Python take as given."""
    with np.load(folder / "features.npz") as data:
        X, T = data["image_features"], data["text_features"]
        P = np.exp(100 * X.astype(np.float64) @ T.T)
        shots = {"Xs": data["support_features"], "ys": data["support_labels"]}
    known = np.load(folder / "checked.npy")
    return {"X": X, "T": T, "X_new": X[:3], "y": known, "V": T, **shots,
            "P": P / P.sum(1, keepdims=True)}  # fmt: skip
