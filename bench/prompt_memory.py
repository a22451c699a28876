"""
Memory of a step of CoOp on a CPU, class by class of ImageNet, against what its chunks allow.

Each number of classes has a process of its own: the largest resident memory beyond the loaded
tower, of one gradient. With chunks it must not grow with the classes by more than what a class
itself takes; all at once, it does. Weights are random: memory does not care.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from bench.common import record
from bench.processes import process_memory, reset_peak_memory, run_isolated

SHOTS = 32  # rows of the batch
GIB = 2**30
MOST = 2.0  # times the bytes of a chunk: what it computes with beside what it keeps


def one_step(model: str, classes: int, n_ctx: int, chunks: bool) -> dict[str, Any]:
    """The gradient of a context shared by ImageNet's first classes, in this process."""
    from open_clip import IMAGENET_CLASSNAMES

    from transclip_fast.encode.models import load_backbone
    from transclip_fast.heads import text_tower as tower
    from transclip_fast.heads.base import unit
    from transclip_fast.heads.prompts import ContextSettings, Prompting, TextTower
    from transclip_fast.heads.prompts.coop import CoOp
    from transclip_fast.heads.task import Labelled, Task

    backbone = load_backbone(model, "none", torch.device("cpu"))
    if not chunks:
        tower.ACTIVATION_BYTES = 1 << 50
    text_tower = TextTower(backbone)
    draw = torch.Generator().manual_seed(0)
    rows = unit(torch.randn(SHOTS, backbone.dim, generator=draw))
    labels = torch.randint(classes, (SHOTS,), generator=draw)
    task = Task(
        text=unit(torch.randn(classes, backbone.dim, generator=draw)),
        shots=Labelled(rows, labels),
        validation=None,
        logit_scale=100.0,
        seed=0,
        progress=lambda done, of: None,
        prompting=Prompting(text_tower, IMAGENET_CLASSNAMES[:classes], ContextSettings(n_ctx)),
    )
    learner = CoOp(task)
    length = learner.prompts.tokens.shape[1]
    chunk = text_tower.chunk(length)
    before = process_memory("VmRSS")
    reset_peak_memory()
    start = time.perf_counter()
    learner.descend(rows, labels)
    return {
        "classes": classes,
        "chunks": chunks,
        "tokens": length,
        "chunk": min(chunk, classes),
        "prompt_bytes": text_tower._row_bytes[length],
        "allowed_bytes": tower.ACTIVATION_BYTES,
        "peak_bytes": process_memory("VmHWM") - before,
        "seconds": time.perf_counter() - start,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure every number of classes and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.prompt_memory", description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--classes", type=int, nargs="+", default=[50, 200, 1000], metavar="K")
    parser.add_argument("--at-once", type=int, nargs="*", default=[50, 200], metavar="K")
    parser.add_argument("--context", type=int, default=16, metavar="M")
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    for chunks, numbers in ((True, options.classes), (False, options.at_once)):
        for classes in numbers:
            row: dict[str, Any] = run_isolated(
                "bench.prompt_memory:one_step",
                model=options.model,
                classes=classes,
                n_ctx=options.context,
                chunks=chunks,
            ).result
            found.append(row)
            print(
                f"{classes:>5} classes {row['tokens']} tokens, {row['chunk']:>4} at a time  "
                f"peak {row['peak_bytes'] / GIB:.2f} GiB  {row['seconds']:.1f} s",
                flush=True,
            )
    above = [
        row for row in found if row["chunks"] and row["peak_bytes"] > MOST * row["allowed_bytes"]
    ]
    if above:
        print(f"more than {MOST} times what a chunk may take: {above}")
        return 1
    record("prompt_memory", {**vars(options), "sizes": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
