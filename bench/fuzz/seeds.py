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
from transclip_fast.store.checkpoint import FileCheckpoint

N_ROWS, N_CLASSES, DIM = 24, 3, 8
NAMES = ["cat", "dog", "red panda"]
OUT = "out"
SOLVE = ("--out", OUT, "--device", "cpu", "--max-iter", "2")
ENCODE = ("--model", "model", "--workers", "0", "--device", "cpu", "--batch-size", "4")
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


@dataclass(frozen=True)
class Target:
    """A valid file and the command that reads it, with paths in the folder of seeds."""

    format: str
    file: str
    command: tuple[str, ...]
    # What a mutated file may not change in silence: the "result", the number of "rows", or nothing.
    kept: str = ""


def build(root: Path, run: Callable[..., int]) -> list[Target]:
    """Write the valid files into `root` with the commands that `run` runs; what reads each."""
    arrays = _arrays()
    targets = [*_features(root, arrays), *_columns(root, arrays), *_priors(root, arrays)]
    targets += _results(root, run)
    targets += _images(root, run)
    return targets


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
    texts = ("--text-features", "text.npy")
    np.savez(root / "f.npz", **arrays, class_names=np.array(NAMES))
    np.savez_compressed(root / "packed.npz", **arrays)
    np.savez(root / "plain.npz", **{k: arrays[k] for k in ("image_features", "text_features")})
    np.save(root / "images.npy", arrays["image_features"])
    np.save(root / "text.npy", arrays["text_features"])
    save_file(tensors, root / "f.safetensors")
    torch.save(tensors, root / "f.pt")
    torch.save(tensors, root / "old.pt", _use_new_zipfile_serialization=False)
    np.save(root / "map.npy", np.eye(DIM, dtype=np.float32))
    map_of = {"weight": torch.eye(DIM), "bias": torch.zeros(DIM)}
    save_file(map_of, root / "map.safetensors")
    caches = root / "caches"
    caches.mkdir()
    shots = {"keys_2shots": tensors["support_features"].T.contiguous()}
    shots["values_2shots"] = torch.nn.functional.one_hot(tensors["support_labels"]).float()
    named = {"test_f": tensors["image_features"], "test_l": tensors["labels"], **shots}
    for name, tensor in {**named, "text_features": tensors["text_features"]}.items():
        torch.save(tensor, caches / f"{name}.pt")
    shot = ("--gamma", "0.02")
    return [
        Target("npz", "f.npz", ("solve", "f.npz", *SOLVE, *shot)),
        Target("npz", "packed.npz", ("solve", "packed.npz", *SOLVE)),
        Target("npz", "f.npz", ("graph", "f.npz", "--out", OUT, "--device", "cpu")),
        Target("npy", "images.npy", ("solve", "images.npy", *texts, *SOLVE)),
        Target("npy", "text.npy", ("solve", "images.npy", *texts, *SOLVE)),
        Target("safetensors", "f.safetensors", ("solve", "f.safetensors", *SOLVE, *shot)),
        Target("pt", "f.pt", ("solve", "f.pt", *SOLVE, *shot)),
        Target("pt", "old.pt", ("solve", "old.pt", *SOLVE, *shot)),
        *(
            Target("caches", f"caches/{name}.pt", ("solve", "caches", *SOLVE, *shot))
            for name in (*named, "text_features")
        ),
        Target("map", "map.npy", ("solve", "f.npz", "--text-map", "map.npy", *SOLVE, *shot)),
        Target(
            "map",
            "map.safetensors",
            ("solve", "plain.npz", "--image-map", "map.safetensors", *SOLVE),
        ),
    ]


def _columns(root: Path, arrays: dict[str, Any]) -> list[Target]:
    """Labels and names in files of every kind."""
    labels = arrays["labels"].tolist()
    words = [NAMES[label] for label in labels]
    (root / "labels.csv").write_text("label\n" + "\n".join(words) + "\n")
    (root / "labels.txt").write_text("\n".join(words) + "\n")
    np.save(root / "labels.npy", arrays["labels"])
    keys = [f"{row}.png" for row in range(N_ROWS)]
    pq.write_table(pa.table({"key": keys, "label": words}), root / "labels.parquet")
    (root / "names.txt").write_text("\n".join(NAMES) + "\n")
    (root / "names.json").write_text(json.dumps(NAMES))
    (root / "numbers.json").write_text(json.dumps({name: k for k, name in enumerate(NAMES)}))
    (root / "names.csv").write_text(
        "name,label\n" + "".join(f"{n},{k}\n" for k, n in enumerate(NAMES))
    )
    np.save(root / "names.npy", np.array(NAMES))
    pq.write_table(pa.table({"name": NAMES, "label": [0, 1, 2]}), root / "names.parquet")
    named = ("--class-names", "names.txt")
    found = []
    for suffix in ("csv", "txt", "npy", "parquet"):
        file = f"labels.{suffix}"
        command = ("solve", "plain.npz", *named, "--labels", file, *SOLVE)
        found.append(Target("labels", file, command))
        known = ("solve", "plain.npz", *named, "--known-labels", file, *SOLVE)
        found.append(Target("labels", file, known))
    for file in (
        "names.txt",
        "names.json",
        "numbers.json",
        "names.csv",
        "names.npy",
        "names.parquet",
    ):
        found.append(Target("names", file, ("solve", "plain.npz", "--class-names", file, *SOLVE)))
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
    found = [
        Target("prior", file, ("solve", "plain.npz", "--prior", file, *SOLVE))
        for file in ("prior.npy", "csr.npz", "listed.npz", "csr.npz")
    ]
    alone = ("solve", "images.npy", "--prior", "csr.npz", *SOLVE)
    logits = ("solve", "plain.npz", "--prior-logits", "logits.npy", *SOLVE)
    return [*found, Target("prior", "csr.npz", alone), Target("prior", "logits.npy", logits)]


def _results(root: Path, run: Callable[..., int]) -> list[Target]:
    """Graphs, results, heads, tables and checkpoints, which commands write."""
    must(
        run, "graph", "plain.npz", "--out", "graph", "--save-index", "flat.index", "--index", "Flat"
    )
    must(
        run,
        "graph",
        "plain.npz",
        "--out",
        "ivf",
        "--save-index",
        "ivf.index",
        "--index",
        "IVF2,Flat",
    )
    must(run, "solve", "f.npz", "--out", "result", "--gamma", "0.02", "--device", "cpu")
    must(run, "train-head", "tip-adapter", "f.npz", "--out", "head.safetensors")
    must(run, "train-head", "clip-adapter", "f.npz", "--out", "adapter.safetensors")
    table = (
        "protocol",
        "few-shot",
        "f.npz",
        "--head",
        "tip-adapter",
        "--shots",
        "1",
        "--seeds",
        "1",
    )
    must(run, *table, "--out", "table")
    row = next((root / "table" / "runs").iterdir()).relative_to(root)
    (root / "subset.txt").write_text("\n".join(NAMES))
    shutil.copy(root / "f.npz", root / "g.npz")
    moved = ("protocol", "domains", "f.npz", "g.npz", "--subset", "g", "subset.txt")
    domains = (*moved, "--head", "tip-adapter", "--shots", "1", "--seeds", "1", "--out", OUT)
    _killed(run, root, 2, "solve", "plain.npz", "--out", "resumed", "--device", "cpu")
    solved = [
        Target(
            "graph", f"graph/{name}", ("solve", "plain.npz", "--graph", "graph", *SOLVE), "result"
        )
        for name in ("manifest.json", "neighbors.npy", "similarities.npy")
    ]
    predict = ("predict", "result", "plain.npz", "--out", OUT, "--device", "cpu")
    resume = ("solve", "plain.npz", "--out", "resumed", "--device", "cpu")
    return [
        *solved,
        *(
            Target("index", file, ("graph", "plain.npz", "--index", file, "--out", OUT))
            for file in ("flat.index", "ivf.index")
        ),
        Target("result", "result/run.json", predict),
        Target("result", "result/mixture.safetensors", predict, "result"),
        Target("result", "result/run.json", ("evaluate", "result")),
        Target("result", "result/predictions.parquet", ("evaluate", "result"), "result"),
        *(
            Target("head", file, ("solve", "plain.npz", "--head", file, *SOLVE))
            for file in ("head.safetensors", "adapter.safetensors")
        ),
        Target("protocol", str(row), (*table, "--out", "table")),
        Target("protocol", "subset.txt", domains),
        Target("checkpoint", ".resumed.solve-0.npz", resume, "result"),
    ]


def _images(root: Path, run: Callable[..., int]) -> list[Target]:
    """Images, lists and tars of them, prompts, a model, and folders of their features."""
    draw = np.random.default_rng(1)
    folder = root / "photos"
    folder.mkdir()
    for number in range(2):
        for kind in IMAGE_KINDS:
            pixels = draw.integers(0, 256, (17, 20, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            if kind == "16bit.png":
                image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
            if kind == "palette.png":
                image = image.convert("P")
            image.save(folder / f"{number}.{kind}")
    files = sorted(folder.iterdir())
    labels = [k % N_CLASSES for k in range(len(files))]
    paths = [f"photos/{file.name}" for file in files]
    (root / "list.txt").write_text("\n".join(paths) + "\n")
    for path in paths[: len(IMAGE_KINDS)]:
        (root / f"{Path(path).name}.txt").write_text(f"{path}\n{paths[-1]}\n")
    few = f"{Path(paths[0]).name}.txt"
    rows = [f"{path},{NAMES[k]}" for path, k in zip(paths, labels, strict=True)]
    (root / "list.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    pq.write_table(pa.table({"path": paths, "label": labels}), root / "list.parquet")
    entries = [[path, k, NAMES[k]] for path, k in zip(paths, labels, strict=True)]
    (root / "split.json").write_text(json.dumps({"train": entries[:6], "test": entries[6:]}))
    members = {}
    for k, file in enumerate(files[:8]):
        members[f"{k:03}.{file.suffix[1:]}"] = file.read_bytes()
        members[f"{k:03}.cls"] = str(labels[k]).encode()
    (root / "set.tar").write_bytes(tar_of(members))
    (root / "templates.txt").write_text("a photo of a {}.\na picture of {}\n")
    (root / "prompts.json").write_text(json.dumps({name: [f"a {name}"] for name in NAMES}))
    weights = _model(root / "model")
    torch.save({"state_dict": weights}, root / "weights.pt")
    torch.save(weights, root / "part.bin")
    parts = {"weight_map": dict.fromkeys(weights, "part.bin")}
    (root / "parts.index.json").write_text(json.dumps(parts))
    named = ("--classes", "names.txt", *ENCODE)
    must(run, "encode", "list.csv", *named, "--out", "features", "--shard-rows", "7")
    return [
        *(
            Target(
                "images",
                f"photos/{file.name}",
                ("encode", f"{file.name}.txt", *ENCODE, "--out", OUT),
                "rows",
            )
            for file in files[: len(IMAGE_KINDS)]
        ),
        *(
            Target("list", file, ("encode", file, *named, "--out", OUT))
            for file in ("list.txt", "list.csv", "list.parquet", "split.json")
        ),
        *(
            Target("tar", "set.tar", ("encode", "set.tar", *named, "--out", OUT), "rows")
            for _ in range(3)
        ),
        *(
            Target("prompts", file, ("encode", few, *named, "--templates", file, "--out", OUT))
            for file in ("templates.txt", "prompts.json")
        ),
        *(
            Target("model", f"model/{file}", ("encode", few, *named, "--out", OUT))
            for file in ("open_clip_config.json", "open_clip_model.safetensors")
        ),
        *(
            Target("model", file, ("convert", whole, "--model", "model", "--out", "c.safetensors"))
            for file, whole in (
                ("weights.pt", "weights.pt"),
                ("parts.index.json", "parts.index.json"),
                ("part.bin", "parts.index.json"),
                ("model/open_clip_config.json", "weights.pt"),
            )
        ),
        *_folders(root),
    ]


def _folders(root: Path) -> list[Target]:
    """The files of a feature folder, read by a solve and by an encode that continues it."""
    solve = ("solve", "features", *SOLVE)
    named = ("--classes", "names.txt", *ENCODE, "--shard-rows", "7", "--out", "features")
    files = ["img_emb/img_emb_00001.npy", "metadata/metadata_00001.parquet", "prototypes.npy"]
    return [
        Target("manifest", "features/manifest.json", solve),
        *(Target("folder", f"features/{file}", solve, "result") for file in files),
        Target("manifest", "features/manifest.json", ("encode", "list.csv", *named)),
        *(Target("resume", f"features/{file}", ("encode", "list.csv", *named)) for file in files),
    ]


def _model(folder: Path) -> dict[str, torch.Tensor]:
    """A model folder with random weights, which are returned."""
    from transclip_fast.encode.networks import draw_weights, empty_network

    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    net: Any = empty_network(CONFIG["model_cfg"])
    draw_weights(net, torch.device("cpu"))
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return weights


def must(run: Callable[..., int], *command: str) -> None:
    """Run a command that makes a seed."""
    if run(*command) != 0:
        raise RuntimeError(f"{' '.join(command)} fails on valid files")


def _killed(run: Callable[..., int], root: Path, states: int, *command: str) -> None:
    """Run a command that is interrupted right after some states of it were kept."""
    keep, left = FileCheckpoint.keep, [states]

    def counted(self: FileCheckpoint, state: Callable[[], Any]) -> None:
        self.seconds = 0.0
        keep(self, state)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with mock.patch.object(FileCheckpoint, "keep", counted):
        run(*command)
