"""Made problems, machine facts, timing and recorded results, which every benchmark shares.

Needs numpy only, so that it runs wherever a solver runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics as stats
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
LOGIT_SCALE = 100.0
SAME_LABELS = 0.999  # least share of rows on which an arm agrees with the reference, or no time
BLOCK_ROWS = 16384  # drawn at a time, with a seed of their own: another size draws other rows
METAVARS = {"queries": "N", "classes": "K", "dim": "D", "repeats": "R", "logit_scale": "TAU"}
Result = TypeVar("Result")

# Lengths of the parts that add up to an image or a text feature, before it is made a unit row.
# Set so that `statistics` of a made problem falls among those of real CLIP features.
IMAGE_CONE, IMAGE_GROUP, IMAGE_CLASS, WITHIN_CLASS, NOISE = 0.79, 0.36, 0.36, 0.46, 0.12
TEXT_CONE, TEXT_GROUP, TEXT_CLASS = 0.91, 0.36, 0.45
CONE_COSINE, GROUP_COSINE, CLASS_COSINE = 0.3, 0.7, 0.42  # of a text part with its image part
IMAGE_PEAKS, TEXT_PEAKS = (-0.75, 0.3, 0.2, -0.15, 0.1), (0.6, -0.5, 0.1)
SPREAD = 0.35  # of log(distance to the class mean) between images
CLASSES_PER_GROUP = 20
MAX_RANK = 256


@dataclass(frozen=True)
class Problem:
    """A transduction problem: unit rows to label, one unit prototype a class, the true labels."""

    features: np.ndarray  # (N, d)
    prototypes: np.ndarray  # (K, d)
    labels: np.ndarray  # (N,) int64


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Return the rows scaled to unit norm."""
    scaled: np.ndarray = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled


def _cone(rng: np.random.Generator, d: int, peaks: tuple[float, ...]) -> np.ndarray:
    """Return a unit direction (d,) whose few largest entries are `peaks`, as CLIP's means have."""
    peaks = peaks[:d]
    direction = unit_rows(rng.standard_normal(d)) * np.sqrt(1 - np.square(peaks).sum())
    direction[rng.choice(d, len(peaks), replace=False)] = peaks
    return unit_rows(direction)


def _basis(rng: np.random.Generator, d: int) -> np.ndarray:
    """Return directions (r, d) of falling length in which image features vary.

    A standard normal r-vector times the basis has unit expected squared length, a variance that
    falls like the spectrum of CLIP features, and a few dimensions with most of the variance.
    """
    rank = min(max(1, d // 2), MAX_RANK)
    order = np.arange(rank)
    spectrum = np.exp(-order / 200) / (1 + order / 5)
    variance = rng.permutation(1 + 12 / (1 + np.arange(d) / 4))  # (d,)
    directions = unit_rows(rng.standard_normal((rank, d)) * np.sqrt(variance))
    directions *= np.sqrt(spectrum / spectrum.sum())[:, None]
    return directions


def _offsets(
    rng: np.random.Generator, n: int, basis: np.ndarray, cosine: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return image offsets (n, d) and text offsets (n, d) that agree only up to `cosine`."""
    rank, d = basis.shape
    image = rng.standard_normal((n, rank)) @ basis
    error = rng.standard_normal((n, d)) / np.sqrt(d)
    return image, cosine * image + np.sqrt(1 - cosine**2) * error


def make_problem(
    n: int,
    k: int,
    d: int,
    *,
    seed: int = 0,
    dtype: type[np.floating] = np.float32,
    shares: np.ndarray | None = None,
) -> Problem:
    """Make a problem whose features look like CLIP's.

    Images and texts lie in two narrow cones, a few dimensions dominate, classes come in groups of
    similar ones, variation is of low rank plus a little isotropic noise, texts are imperfect
    pictures of the class means, and class sizes fall like a shifted power law (the largest has
    about eleven times the rows of the median one; a class may have none when N is small), or are
    drawn with the `shares` (K,) of the rows. The same seed and sizes give the same problem.
    """
    rng = np.random.default_rng(seed)
    basis = _basis(rng, d)
    image_cone = _cone(rng, d, IMAGE_PEAKS)
    own_cone = np.sqrt(1 - CONE_COSINE**2) * _cone(rng, d, TEXT_PEAKS)
    text_cone = unit_rows(CONE_COSINE * image_cone + own_cone)
    n_groups = -(-k // CLASSES_PER_GROUP)
    group = np.arange(k) % n_groups
    image_group, text_group = _offsets(rng, n_groups, basis, GROUP_COSINE)
    image_class, text_class = _offsets(rng, k, basis, CLASS_COSINE)
    means = IMAGE_CONE * image_cone + IMAGE_GROUP * image_group[group] + IMAGE_CLASS * image_class
    texts = TEXT_CONE * text_cone + TEXT_GROUP * text_group[group] + TEXT_CLASS * text_class
    sizes = rng.permutation(1 / (np.arange(k) + k / 20))
    labels = rng.choice(k, n, p=sizes / sizes.sum() if shares is None else shares)

    features = np.empty((n, d), dtype)
    means, basis = means.astype(np.float32), basis.astype(np.float32)
    for start in range(0, n, BLOCK_ROWS):
        block = labels[start : start + BLOCK_ROWS]
        features[start : start + BLOCK_ROWS] = _images([seed, start], means[block], basis)
    return Problem(features, unit_rows(texts).astype(dtype), labels)


def _images(seed: list[int], means: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return one float32 unit row for each row of class means (n, d)."""
    rng = np.random.default_rng(seed)
    n, d = means.shape
    spread = np.exp(SPREAD * rng.standard_normal((n, 1), np.float32) - SPREAD**2)
    rows = rng.standard_normal((n, len(basis)), np.float32) @ basis
    rows *= WITHIN_CLASS * spread
    rows += rng.standard_normal((n, d), np.float32) * np.float32(NOISE / np.sqrt(d))
    rows += means
    return unit_rows(rows)


def _mean_cosine(rows: np.ndarray) -> float:
    """Return the mean cosine of two different unit rows of (n, d)."""
    n, total = len(rows), rows.sum(0)
    return float((total @ total - n) / (n * (n - 1)))


def statistics(
    features: np.ndarray,
    prototypes: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    *,
    max_rows: int = 4096,
) -> dict[str, float]:
    """Describe the first `max_rows` features by the numbers that decide how a solver behaves.

    Cosines, ratios of a dimension's largest to median value, shares between 0 and 1. Prototypes
    (K, d) and labels (N,) add the numbers about texts and classes.
    """
    f = features[:max_rows].astype(np.float64)
    mean, variance = np.abs(f.mean(0)), f.var(0)
    spectrum = np.linalg.eigvalsh(np.cov(f.T))
    cosine = f @ f.T
    np.fill_diagonal(cosine, -np.inf)
    neighbors = np.argpartition(-cosine, 3, axis=1)[:, :3]
    found = {
        "image_cosine": _mean_cosine(f),
        "mean_peak": mean.max() / np.median(mean),
        "variance_peak": variance.max() / np.median(variance),
        "participation_ratio": spectrum.sum() ** 2 / np.square(spectrum).sum(),
        "nearest_cosine": cosine.max(1).mean(),
    }
    if prototypes is not None:
        t = prototypes.astype(np.float64)
        cosine = f @ t.T  # (n, K)
        guess = cosine.argmax(1)
        mass = np.exp(LOGIT_SCALE * (cosine - cosine.max(1, keepdims=True)))
        mass = -np.sort(-mass / mass.sum(1, keepdims=True), axis=1)
        found |= {
            "text_cosine": _mean_cosine(t),
            "image_text_cosine": cosine.mean(),
            "image_text_std": cosine.std(),
            "top1_mass": mass[:, 0].mean(),
            "top8_mass": mass[:, :8].sum(1).mean(),
            "neighbors_agree": (guess[neighbors] == guess[:, None]).mean(),
        }
        if labels is not None:
            found["zero_shot_accuracy"] = (guess == labels[:max_rows]).mean()
    if labels is not None:
        found["neighbors_same_class"] = (labels[neighbors] == labels[:max_rows, None]).mean()
    return {name: float(value) for name, value in found.items()}


def _output(*command: str) -> str | None:
    """Return what a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(  # noqa: S603 - the callers below name every command
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _version(*names: str) -> str | None:
    """Return the version of the first installed distribution among `names`."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@cache
def machine_facts() -> dict[str, Any]:
    """Return what a time depends on: processor, memory, GPU, versions, commit (None: absent)."""
    processor = "".join(Path("/proc/cpuinfo").read_text().partition("model name")[2:])
    flags = processor.partition("flags")[2].partition("\n")[0].split()
    changes = _output("git", "status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {
        "cpu": processor.partition("\n")[0].strip("\t :") or platform.machine(),
        "instructions": [x for x in ("avx2", "avx512f", "avx512_vnni") if x in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": _version("torch"),
        "triton": _version("triton"),
        "faiss": _version("faiss-gpu", "faiss-gpu-cu12", "faiss-cpu"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def busy_cores(seconds: float = 2.0) -> float:
    """Return how many of the machine's cores are busy, on average over some seconds of waiting."""

    def ticks() -> tuple[int, int]:
        times = [int(x) for x in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        return sum(times), times[3] + times[4]  # idle, and waiting for a disk

    total, idle = ticks()
    time.sleep(seconds)
    later, idle_later = ticks()
    return (os.cpu_count() or 1) * (1 - (idle_later - idle) / max(later - total, 1))


def in_turns(
    run: Callable[[str], Result], arms: Iterable[str], repeats: int
) -> dict[str, list[Result]]:
    """Run the arms in turns, so that a slow spell of the machine hits all of them."""
    results: dict[str, list[Result]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, found in results.items():
            found.append(run(arm))
    return results


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each arm's times, in seconds."""
    return {name: stats.median(seconds) for name, seconds in times.items()}


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """
    Return the median over rounds of the time of `slow` divided by that of `fast`.

    The two times of a round met the same machine. An arm that ran once is compared with every
    round of the other.
    """
    rounds = max(len(times[slow]), len(times[fast]))
    pairs = [times[arm] * (rounds if len(times[arm]) == 1 else 1) for arm in (slow, fast)]
    return float(stats.median(a / b for a, b in zip(*pairs, strict=True)))


def command_line(spec: ModuleSpec, doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return the parser of a benchmark: an option of each default, with the default's type.

    `spec` is the module's `__spec__`, which names its command, `doc` its `__doc__`. A list is the
    default of an option that takes several values.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {spec.name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in defaults.items():
        several = isinstance(default, list)
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default[0] if several else default),
            nargs="+" if several else None,
            default=default,
            metavar=METAVARS.get(name),
            help="default: %(default)s",
        )
    return parser


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text in columns, each as wide as its widest cell."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip(), flush=True)


def record(name: str, row: Mapping[str, Any], *, folder: Path = RESULTS) -> Path:
    """Append a row, with date, command line and machine facts, to `folder`/`name`.jsonl.

    Returns the path of the file. Earlier rows are never changed.
    """
    line = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "machine": machine_facts(),
        **row,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return path
