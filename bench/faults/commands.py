"""The commands that are tried, on inputs as small as they can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.common import make_problem, unit_rows
from transclip_fast.solver.layout import Layout, Size

NAMES = ("cat", "dog", "owl")
MODEL_CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"width": 8, "heads": 1, "layers": 1, "context_length": 8},
}
ENCODE = (
    "encode images --model model --classes names.txt --labels-from-folders --workers 0 "
    "--shard-rows 3 --batch-size 2 --out features"
)
RUN = (
    "run images --model model --classes names.txt --labels-from-folders --workers 0 "
    "--shard-rows 4 --batch-size 2 --csv --out out"
)


@dataclass(frozen=True)
class Case:
    """
    A command line, run in a folder of its own.

    Parameters
    ----------
    prepare : callable
        Fills the current folder with the inputs.
    command : str
    earlier : tuple of str
        Commands that ran there before; what they left is replaced, or grows.
    change : callable, optional
        Changes inputs after the earlier commands.
    whole : tuple of str
        Files and folders that appear whole, so that each is the old or the new one at any time.
    features : str, optional
        A feature folder that grows; while it is neither the old nor the new one, it is refused.
    workers : bool
        Whether processes help, so that one that is killed may be one of them.
    """

    prepare: Callable[[], None]
    command: str
    earlier: tuple[str, ...] = ()
    change: Callable[[], None] | None = None
    whole: tuple[str, ...] = ()
    features: str | None = None
    workers: bool = False


def write_features() -> None:
    """A file of a made problem with queries, shots and validation rows."""
    problem = make_problem(60, 4, 8, seed=1)
    arrays: dict[str, Any] = {"text_features": problem.prototypes}
    for name, first, last in (("image", 0, 30), ("support", 30, 46), ("validation", 46, 60)):
        arrays[f"{name}_features"] = problem.features[first:last]
        arrays["labels" if name == "image" else f"{name}_labels"] = problem.labels[first:last]
    np.savez("features.npz", **arrays)
    np.save("images.npy", problem.features[:30])
    np.save("texts.npy", problem.prototypes)


def write_shards() -> None:
    """A feature folder of three shards, as other programs write them."""
    problem = make_problem(60, 4, 8, seed=1)
    Path("shards/img_emb").mkdir(parents=True)
    for shard in range(3):
        rows = problem.features[20 * shard : 20 * (shard + 1)]
        np.save(f"shards/img_emb/img_emb_{shard}.npy", rows)
    np.save("shards/prototypes.npy", problem.prototypes)


def least_memory(assignments: int | None) -> int:
    """Bytes with which the rows of `write_shards` are just solved, and not held in memory."""
    size, cpu = Size(60, 4, 8, file_bytes=4 * 60 * 8), torch.device("cpu")
    return size.used(cpu) + Layout(assignments, held=False).solve_bytes(size, cpu)


def write_few() -> None:
    """A file of the demo model's dimensions, for a prompt learner."""
    draw = np.random.default_rng(0)
    rows = unit_rows(draw.normal(size=(12, 512))).astype(np.float32)
    labels = np.arange(6) % 3
    np.savez(
        "features.npz",
        image_features=rows[:6],
        labels=labels,
        support_features=rows[6:],
        support_labels=labels,
        text_features=rows[:3],
        class_names=["photo", "picture", "image"],
    )


def write_images() -> None:
    """Images of three classes in folders, their names, and a model folder."""
    draw = np.random.default_rng(0)
    for i in range(7):
        file = Path("images", NAMES[i % 3], f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(file)
    Path("names.txt").write_text("".join(f"{name}\n" for name in NAMES))
    _write_model()


def write_pairs() -> None:
    """Images, a model folder, and captions of the images beside false ones."""
    write_images()
    lines = ["image,caption,negative,group"]
    for i, file in enumerate(sorted(Path("images").rglob("*.png"))):
        lines.append(f"{file},a red {i} on black,a black {i} on red,{i % 2}")
    Path("pairs.csv").write_text("".join(f"{line}\n" for line in lines))


def write_pair_features() -> None:
    """Features of images, of their captions and of false ones."""
    draw = np.random.default_rng(0)
    rows = unit_rows(draw.normal(size=(60, 8))).astype(np.float32)
    images, captions, negatives = np.split(rows, 3)
    np.savez(
        "pairs.npz",
        image_features=images,
        caption_features=captions,
        negative_features=negatives,
    )


def change_images() -> None:
    """One image goes, one is another, two are new."""
    first, second, third = sorted(Path("images").rglob("*.png"))[:3]
    first.unlink()
    shutil.copy(third, second)
    for number in (8, 9):
        Image.new("RGB", (5, 6), (number, 0, 0)).save(f"images/cat/{number}.png")


def write_checkpoint() -> None:
    """A model folder without its weights, and these in a file beside it."""
    _write_model()
    Path("model/open_clip_model.safetensors").rename("official.safetensors")


def _write_model() -> None:
    from transclip_fast.encode.networks import draw_weights, empty_network

    Path("model").mkdir()
    Path("model/open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL_CONFIG}))
    network = empty_network(MODEL_CONFIG)
    draw_weights(network, torch.device("cpu"))
    save_file(network.state_dict(), "model/open_clip_model.safetensors")


def _nothing() -> None:
    """A command without inputs."""


CASES = {
    "convert": Case(
        write_checkpoint,
        "convert official.safetensors --model model --out new/weights.safetensors",
        whole=("new/weights.safetensors",),
    ),
    "encode": Case(write_images, f"{ENCODE} --local-features 2", features="features"),
    "encode with workers": Case(
        write_images,
        ENCODE.replace("--workers 0", "--workers 2"),
        features="features",
        workers=True,
    ),
    "encode grown": Case(write_images, ENCODE, (ENCODE,), change_images, features="features"),
    "encode relabelled": Case(
        write_images, ENCODE, (ENCODE.replace("--labels-from-folders ", ""),), features="features"
    ),
    "graph": Case(
        write_features,
        "graph features.npz --search exact --out graph",
        ("graph features.npz --search exact --n-neighbors 2 --out graph",),
        whole=("graph",),
    ),
    "graph --save-index": Case(
        write_features,
        "graph features.npz --search faiss --save-index image.index --out graph",
        whole=("graph", "image.index"),
    ),
    "solve": Case(
        write_features,
        "solve features.npz --assignments dense --max-iter 3 --csv --out result",
        ("solve features.npz --assignments dense --max-iter 1 --out result",),
        whole=("result",),
    ),
    "solve of files": Case(
        write_features,
        "solve images.npy --text-features texts.npy --assignments sparse --max-iter 3 "
        "--out new/result",
        whole=("new/result",),
    ),
    "solve streamed, dense": Case(
        write_shards,
        f"solve shards --assignments dense --memory {least_memory(None)} --max-iter 3 --out result",
        ("solve shards --max-iter 1 --out result",),
        whole=("result",),
    ),
    "solve streamed, sparse": Case(
        write_shards,
        f"solve shards --assignments sparse --memory {least_memory(4)} --max-iter 3 --out result",
        whole=("result",),
    ),
    "solve --method": Case(
        write_features,
        "solve features.npz --method zlap --out result",
        ("solve features.npz --max-iter 1 --out result",),
        whole=("result",),
    ),
    "compare": Case(
        write_features,
        "compare features.npz --methods transclip,zero-shot,zlap --out table.md",
        ("compare features.npz --methods zero-shot --out table.md",),
        whole=("table.md",),
    ),
    "predict": Case(
        write_features,
        "predict result features.npz --csv --out labels",
        ("solve features.npz --out result", "predict result features.npz --out labels"),
        whole=("result", "labels"),
    ),
    "evaluate": Case(
        write_features, "evaluate result", ("solve features.npz --out result",), whole=("result",)
    ),
    "report": Case(
        write_features,
        "report result --out page.html",
        ("solve features.npz --out result",),
        whole=("result", "page.html"),
    ),
    "suggest": Case(
        write_features,
        "suggest result -n 5 --csv check.csv",
        ("solve features.npz --out result",),
        whole=("result", "check.csv"),
    ),
    "train-head taskres": Case(
        write_features,
        "train-head taskres features.npz --out head.safetensors",
        ("train-head taskres features.npz --shots 1 --out head.safetensors",),
        whole=("head.safetensors",),
    ),
    "train-head coop": Case(
        write_few,
        "train-head coop features.npz --model demo --context 2 --epochs 3 --out head.safetensors",
        whole=("head.safetensors",),
    ),
    "train-map": Case(
        write_pair_features,
        "train-map pairs.npz --epochs 3 --out map.safetensors",
        ("train-map pairs.npz --epochs 1 --out map.safetensors",),
        whole=("map.safetensors",),
    ),
    "evaluate-pairs": Case(
        write_pairs,
        "evaluate-pairs pairs.csv --model model --workers 0 --batch-size 2 --features features",
    ),
    "protocol": Case(
        write_features,
        "protocol few-shot features.npz --head taskres transclip-fs --shots 1 --seeds 2 "
        "--out table",
        ("protocol few-shot features.npz --head taskres --shots 1 --seeds 1 --out table",),
        whole=("table/table.md", "table/table.parquet", "table/runs.parquet", "table/run.json"),
    ),
    "run": Case(
        write_images,
        RUN,
        (RUN,),
        change_images,
        whole=("out/graph", "out/result", "out/report.html"),
        features="out/features",
    ),
    "demo": Case(
        _nothing, "demo --out demo", whole=("demo/changed.png", "demo/run.json", "demo/report.html")
    ),
}
