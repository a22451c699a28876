"""Small valid files of every format, and the command that reads each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import sparse

from bench.fuzz.containers import tar_of
from transclip_fast.encode.networks import draw_weights, empty_network
from transclip_fast.graph.faiss_index import faiss_installed
from transclip_fast.store.checkpoint import FileCheckpoint, Interval

FORMATS = (
    "caches", "checkpoint", "folder", "graph", "head", "images", "index", "labels", "list",
    "manifest", "map", "model", "names", "npy", "npz", "prior", "prompts", "protocol", "pt",
    "result", "resume", "safetensors", "tar",
)  # fmt: skip
N_ROWS, N_CLASSES, DIM = 24, 3, 8
NAMES = ["cat", "dog", "red panda"]
OUT = "out"
SOLVE = f"--out {OUT} --device cpu --max-iter 2"
ENCODE = "--model model --workers 0 --device cpu --batch-size 4"
NAMED = f"--classes names.txt {ENCODE}"
FEW_SHOT = "--head tip-adapter --shots 1 --seeds 1"
IMAGE_KINDS = ("png", "jpg", "gif", "tiff", "webp", "bmp", "16bit.png", "ppm", "palette.png")
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": DIM,
        "vision_cfg": {
            "image_size": 16,
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 8,
            "heads": 2,
            "layers": 1,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
Run = Callable[[str], int]  # of a command, to its exit code


@dataclass(frozen=True)
class Target:
    """A valid file and the command that reads it, with paths in the folder of seeds."""

    format: str
    file: str
    command: str
    # What a mutated file may not change in silence: the "result", or lose: "rows"; or nothing.
    kept: str = ""


def build(root: Path, run: Run) -> list[Target]:
    """Write the valid files into `root`, with the commands that `run` runs; what reads each."""
    arrays = _arrays()
    targets = [*_features(root, arrays), *_columns(root, arrays), *_priors(root, arrays)]
    return [*targets, *_results(root, run), *_images(root, run)]


def _arrays() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    text = _unit(draw.normal(size=(N_CLASSES, DIM)) + 1)
    labels = np.arange(N_ROWS) % N_CLASSES
    rows = _unit(text[labels] + 0.2 * draw.normal(size=(N_ROWS, DIM)))
    few = np.arange(6)
    return {
        "image_features": rows,
        "text_features": text,
        "labels": labels,
        "support_features": rows[few],
        "support_labels": labels[few],
        "validation_features": rows[few + 6],
        "validation_labels": labels[few + 6],
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def _features(root: Path, arrays: dict[str, Any]) -> list[Target]:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    np.savez(root / "f.npz", **arrays, class_names=np.array(NAMES))
    np.savez_compressed(root / "packed.npz", **arrays)
    np.savez(root / "plain.npz", **{k: arrays[k] for k in ("image_features", "text_features")})
    np.save(root / "images.npy", arrays["image_features"])
    np.save(root / "text.npy", arrays["text_features"])
    save_file(tensors, root / "f.safetensors")
    torch.save(tensors, root / "f.pt")
    torch.save(tensors, root / "old.pt", _use_new_zipfile_serialization=False)
    np.save(root / "map.npy", np.eye(DIM, dtype=np.float32))
    save_file({"weight": torch.eye(DIM), "bias": torch.zeros(DIM)}, root / "map.safetensors")
    (root / "caches").mkdir()
    caches = {
        "test_f": tensors["image_features"],
        "test_l": tensors["labels"],
        "keys_2shots": tensors["support_features"].T.contiguous(),
        "values_2shots": torch.nn.functional.one_hot(tensors["support_labels"]).float(),
        "text_features": tensors["text_features"],
    }
    for name, tensor in caches.items():
        torch.save(tensor, root / f"caches/{name}.pt")
    shot, texts = f"{SOLVE} --gamma 0.02", f"--text-features text.npy {SOLVE}"
    return [
        Target("npz", "f.npz", f"solve f.npz {shot}"),
        Target("npz", "packed.npz", f"solve packed.npz {SOLVE}"),
        Target("npz", "f.npz", f"graph f.npz --device cpu --out {OUT}"),
        Target("npy", "images.npy", f"solve images.npy {texts}"),
        Target("npy", "text.npy", f"solve images.npy {texts}"),
        Target("safetensors", "f.safetensors", f"solve f.safetensors {shot}"),
        Target("pt", "f.pt", f"solve f.pt {shot}"),
        Target("pt", "old.pt", f"solve old.pt {shot}"),
        *(Target("caches", f"caches/{name}.pt", f"solve caches {shot}") for name in caches),
        Target("map", "map.npy", f"solve f.npz --text-map map.npy {shot}"),
        Target("map", "map.safetensors", f"solve plain.npz --image-map map.safetensors {SOLVE}"),
    ]


def _columns(root: Path, arrays: dict[str, Any]) -> list[Target]:
    """Labels and names in files of every kind."""
    words = [NAMES[label] for label in arrays["labels"]]
    (root / "labels.csv").write_text("label\n" + "\n".join(words) + "\n")
    (root / "labels.txt").write_text("\n".join(words) + "\n")
    np.save(root / "labels.npy", arrays["labels"])
    pq.write_table(pa.table({"row": range(N_ROWS), "label": words}), root / "labels.parquet")
    numbers = {name: k for k, name in enumerate(NAMES)}
    (root / "names.txt").write_text("\n".join(NAMES) + "\n")
    (root / "names.json").write_text(json.dumps(NAMES))
    (root / "numbers.json").write_text(json.dumps(numbers))
    lines = [f"{name},{k}\n" for name, k in numbers.items()]
    (root / "names.csv").write_text("".join(["name,label\n", *lines]))
    np.save(root / "names.npy", np.array(NAMES))
    pq.write_table(pa.table({"name": NAMES, "label": [0, 1, 2]}), root / "names.parquet")
    found = []
    for file in ("labels.csv", "labels.txt", "labels.npy", "labels.parquet"):
        for option in ("--labels", "--known-labels"):
            command = f"solve plain.npz --class-names names.txt {option} {file} {SOLVE}"
            found.append(Target("labels", file, command))
    files = "names.txt names.json numbers.json names.csv names.npy names.parquet"
    for file in files.split():
        found.append(Target("names", file, f"solve plain.npz --class-names {file} {SOLVE}"))
    return found


def _priors(root: Path, arrays: dict[str, Any]) -> list[Target]:
    prior = np.full((N_ROWS, N_CLASSES), 0.2)
    prior[np.arange(N_ROWS), arrays["labels"]] = 0.6
    np.save(root / "prior.npy", prior)
    np.save(root / "logits.npy", np.log(prior))
    sparse.save_npz(root / "csr.npz", sparse.csr_matrix(np.where(prior > 0.5, prior, 0)))
    order = np.argsort(-prior, 1)[:, :2]
    values = np.take_along_axis(prior, order, 1)
    np.savez(root / "listed.npz", prior_indices=order, prior_values=values)
    return [
        *(
            Target("prior", file, f"solve plain.npz --prior {file} {SOLVE}")
            for file in ("prior.npy", "csr.npz", "listed.npz")
        ),
        Target("prior", "csr.npz", f"solve images.npy --prior csr.npz {SOLVE}"),
        Target("prior", "logits.npy", f"solve plain.npz --prior-logits logits.npy {SOLVE}"),
    ]


def _results(root: Path, run: Run) -> list[Target]:
    """Graphs, results, heads, tables and checkpoints, which commands write."""
    (root / "subset.txt").write_text("\n".join(NAMES))
    shutil.copy(root / "f.npz", root / "g.npz")
    table = f"protocol few-shot f.npz {FEW_SHOT} --out table"
    resume = "solve plain.npz --device cpu --out resumed"
    must(run, "graph plain.npz --device cpu --out graph")
    must(run, "solve f.npz --gamma 0.02 --device cpu --out result")
    must(run, "train-head tip-adapter f.npz --out head.safetensors")
    must(run, "train-head clip-adapter f.npz --out adapter.safetensors")
    must(run, table)
    _killed(run, resume, 2)
    row = next((root / "table" / "runs").iterdir()).relative_to(root)
    moved = f"protocol domains f.npz g.npz --subset g subset.txt {FEW_SHOT} --out {OUT}"
    graph, head = (f"solve plain.npz --{what} {{}} {SOLVE}" for what in ("graph", "head"))
    predict = f"predict result plain.npz --device cpu --out {OUT}"
    parts = ("manifest.json", "neighbors.npy", "similarities.npy")
    return [
        *(Target("graph", f"graph/{name}", graph.format("graph"), "result") for name in parts),
        *_indexes(run),
        Target("result", "result/run.json", predict),
        Target("result", "result/mixture.safetensors", predict, "result"),
        Target("result", "result/run.json", "evaluate result"),
        Target("result", "result/predictions.parquet", "evaluate result", "result"),
        *(
            Target("head", file, head.format(file))
            for file in ("head.safetensors", "adapter.safetensors")
        ),
        Target("protocol", str(row), table),
        Target("protocol", "subset.txt", moved),
        Target("checkpoint", ".resumed.solve-0.npz", resume, "result"),
    ]


def _indexes(run: Run) -> list[Target]:
    if not faiss_installed():
        return []
    found = []
    for file, factory in (("flat.index", "Flat"), ("ivf.index", "IVF2,Flat")):
        made = f"--save-index {file} --out {file}.graph"
        must(run, f"graph plain.npz --index {factory} {made}")
        found.append(Target("index", file, f"graph plain.npz --index {file} --out {OUT}"))
    return found


def _images(root: Path, run: Run) -> list[Target]:
    """Images, lists and tars of them, prompts, a model, and a folder of their features."""
    draw = np.random.default_rng(1)
    (root / "photos").mkdir()
    for number in range(2):
        for kind in IMAGE_KINDS:
            pixels = draw.integers(0, 256, (17, 20, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            if kind == "16bit.png":
                image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
            if kind == "palette.png":
                image = image.convert("P")
            image.save(root / f"photos/{number}.{kind}")
    paths = sorted(f"photos/{file.name}" for file in (root / "photos").iterdir())
    _lists(root, paths)
    (root / "templates.txt").write_text("a photo of a {}.\na picture of {}\n")
    (root / "prompts.json").write_text(json.dumps({name: [f"a {name}"] for name in NAMES}))
    _model(root)
    few = f"encode {Path(paths[0]).name}.txt"
    must(run, f"encode list.csv {NAMED} --out features --shard-rows 7")
    convert = "convert {} --model model --out converted.safetensors"
    lists = ("list.txt", "list.csv", "list.parquet", "split.json")
    return [
        *(
            Target("images", path, f"encode {Path(path).name}.txt {ENCODE} --out {OUT}", "rows")
            for path in paths[: len(IMAGE_KINDS)]
        ),
        *(Target("list", file, f"encode {file} {NAMED} --out {OUT}") for file in lists),
        *[Target("tar", "set.tar", f"encode set.tar {NAMED} --out {OUT}", "rows")] * 3,
        *(
            Target("prompts", file, f"{few} {NAMED} --templates {file} --out {OUT}")
            for file in ("templates.txt", "prompts.json")
        ),
        *(
            Target("model", f"model/{file}", f"{few} {NAMED} --out {OUT}")
            for file in ("open_clip_config.json", "open_clip_model.safetensors")
        ),
        Target("model", "weights.pt", convert.format("weights.pt")),
        Target("model", "model/open_clip_config.json", convert.format("weights.pt")),
        Target("model", "parts.index.json", convert.format("parts.index.json")),
        Target("model", "part.bin", convert.format("parts.index.json")),
        *_folders(),
    ]


def _lists(root: Path, paths: list[str]) -> None:
    """Lists of all images, and of each with another, and a tar of some."""
    (root / "list.txt").write_text("\n".join(paths) + "\n")
    for path in paths[: len(IMAGE_KINDS)]:
        (root / f"{Path(path).name}.txt").write_text(f"{path}\n{paths[-1]}\n")
    labels = [k % N_CLASSES for k in range(len(paths))]
    rows = [f"{path},{NAMES[k]}" for path, k in zip(paths, labels, strict=True)]
    (root / "list.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    pq.write_table(pa.table({"path": paths, "label": labels}), root / "list.parquet")
    entries = [[path, k, NAMES[k]] for path, k in zip(paths, labels, strict=True)]
    (root / "split.json").write_text(json.dumps({"train": entries[:6], "test": entries[6:]}))
    members = {}
    for k, path in enumerate(paths[:8]):
        members[f"{k:03}{Path(path).suffix}"] = (root / path).read_bytes()
        members[f"{k:03}.cls"] = str(labels[k]).encode()
    (root / "set.tar").write_bytes(tar_of(members))


def _folders() -> list[Target]:
    """The files of a feature folder, read by a solve and by an encode that continues it."""
    solve, encode = f"solve features {SOLVE}", f"encode list.csv {NAMED} --out features"
    files = ["img_emb/img_emb_00001.npy", "metadata/metadata_00001.parquet", "prototypes.npy"]
    return [
        Target("manifest", "features/manifest.json", solve),
        Target("manifest", "features/manifest.json", f"{encode} --shard-rows 7"),
        *(Target("folder", f"features/{file}", solve, "result") for file in files),
        *(Target("resume", f"features/{file}", f"{encode} --shard-rows 7") for file in files),
    ]


def _model(root: Path) -> None:
    """A model folder with random weights, and checkpoints of these of other kinds."""
    folder = root / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    net: Any = empty_network(CONFIG["model_cfg"])
    draw_weights(net, torch.device("cpu"))
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    torch.save({"state_dict": weights}, root / "weights.pt")
    torch.save(weights, root / "part.bin")
    parts = {"weight_map": dict.fromkeys(weights, "part.bin")}
    (root / "parts.index.json").write_text(json.dumps(parts))


def must(run: Run, command: str) -> None:
    """Run a command that makes a seed."""
    if run(command) != 0:
        raise RuntimeError(f"{command} fails on valid files")


def _killed(run: Run, command: str, states: int) -> None:
    """Run a command that is interrupted right after some states of it were kept."""
    keep, left = FileCheckpoint.keep, [states]

    def counted(self: FileCheckpoint, state: Callable[[], Any]) -> None:
        keep(self, state)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    always = mock.patch.object(Interval, "over", new=True)
    with always, mock.patch.object(FileCheckpoint, "keep", counted):
        run(command)
