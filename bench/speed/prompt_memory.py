"""Memory of a step of CoOp on a CPU for growing numbers of ImageNet's classes.

Each number of classes has a process of its own. Memory is the largest resident memory of one
gradient beyond the loaded tower. In chunks of classes it must stay below twice the bytes that a
chunk may take; with all classes at once it grows with them. Weights are random, which makes no
difference to memory.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip import IMAGENET_CLASSNAMES

from bench.common import command_line, record
from bench.processes import measured, run_isolated
from transclip_fast.data.feature_rows import unit
from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.encode.models import load_backbone
from transclip_fast.heads import text_tower as tower
from transclip_fast.heads.prompts import ContextSettings, Prompting, TextTower
from transclip_fast.heads.prompts.coop import CoOp
from transclip_fast.heads.task import HeadTask

SHOTS = 32  # rows of the batch
GIB = 2**30
CHUNK_TIMES = 2.0  # a chunk's allowed bytes: temporaries come on top of the kept activations


def one_step(model: str, classes: int, n_ctx: int, chunks: bool) -> dict[str, Any]:
    """Compute the gradient of a context shared by ImageNet's first classes, in this process."""
    backbone = load_backbone(model, "none", torch.device("cpu"))
    if not chunks:
        tower.ACTIVATION_BYTES = 1 << 50
    text_tower = TextTower(backbone)
    draw = torch.Generator().manual_seed(0)
    rows = unit(torch.randn(SHOTS, backbone.dim, generator=draw))
    labels = torch.randint(classes, (SHOTS,), generator=draw)
    task = HeadTask(
        text=unit(torch.randn(classes, backbone.dim, generator=draw)),
        shots=LabelledRows(rows, labels),
        validation=None,
        logit_scale=100.0,
        seed=0,
        progress=lambda done, of: None,
        prompting=Prompting(text_tower, IMAGENET_CLASSNAMES[:classes], ContextSettings(n_ctx)),
    )
    learner = CoOp(task)
    length = learner.prompts.tokens.shape[1]
    chunk = text_tower.chunk(length)
    _, seconds, peak = measured(lambda: learner.descend(rows, labels))
    return {
        "classes": classes,
        "chunks": chunks,
        "tokens": length,
        "chunk": min(chunk, classes),
        "prompt_bytes": text_tower._row_bytes[length],
        "allowed_bytes": tower.ACTIVATION_BYTES,
        "peak_bytes": peak,
        "seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure every number of classes and return the exit code."""
    parser = command_line(__spec__, __doc__, model="ViT-B-32", classes=[50, 200, 1000], context=16)
    parser.add_argument("--at-once", type=int, nargs="*", default=[50, 200], metavar="K")
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    for chunks, numbers in ((True, options.classes), (False, options.at_once)):
        for classes in numbers:
            row: dict[str, Any] = run_isolated(
                "bench.speed.prompt_memory:one_step",
                model=options.model,
                classes=classes,
                n_ctx=options.context,
                chunks=chunks,
            )
            found.append(row)
            print(
                f"{classes:>5} classes {row['tokens']} tokens, {row['chunk']:>4} at a time  "
                f"peak {row['peak_bytes'] / GIB:.2f} GiB  {row['seconds']:.1f} s",
                flush=True,
            )
    above = [
        row
        for row in found
        if row["chunks"] and row["peak_bytes"] > CHUNK_TIMES * row["allowed_bytes"]
    ]
    if above:
        print(f"more than {CHUNK_TIMES} times what a chunk may take: {above}")
        return 1
    record("prompt_memory", {**vars(options), "sizes": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
