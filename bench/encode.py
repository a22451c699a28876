"""
How close encoding comes to its two halves: `python -m bench.encode IMAGES`.

Arms over the same files, interleaved: the model alone over one batch again and again, the decoding
workers alone, the whole of `encode`, and, where `TRANSCLIP_CLIP_RETRIEVAL` names a checkout, the
loop of clip-retrieval around the same network. The ceiling is the slower of the two halves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import clip_retrieval
from bench.common import medians, record
from transclip_fast.cli.encode import encode_with
from transclip_fast.cli.session import Stages
from transclip_fast.encode.batch_size import made_images
from transclip_fast.encode.feed import feed
from transclip_fast.encode.models import Backbone, load_backbone
from transclip_fast.encode.pixels import decoder
from transclip_fast.encode.sources import Source, open_source

FORWARD_BATCHES = 3
SAME = 0.999  # least cosine of a feature with clip-retrieval's


def forward_loop(backbone: Backbone, size: int) -> int:
    """The image tower alone; how many images it embedded."""
    images = made_images(backbone, size)
    with torch.inference_mode():
        for _ in range(FORWARD_BATCHES):
            backbone.embed(images, size)
    return FORWARD_BATCHES * size


def decode_loop(source: Source, backbone: Backbone, size: int, workers: int) -> int:
    """The decoding workers alone; how many images they decoded."""
    rows = range(len(source))
    batches = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    return sum(len(batch) for batch in feed(source, backbone, batches, workers))


def encode_loop(source: Source, backbone: Backbone, size: int, workers: int, out: Path) -> int:
    """The whole: decoding, embedding, writing the folder."""
    made = encode_with(source, backbone, str(out), None, Stages(), batch_size=size, workers=workers)
    assert not list(made.writer.failures())
    return len(source)


def repeated(listed: Source, number: int, folder: Path) -> Source:
    """A folder of links to the files of a source, again and again until they are `number`."""
    for row in range(number):
        file = Path(listed.files[row % len(listed)]).resolve()
        (folder / f"{row:06}{file.suffix}").symlink_to(file)
    return open_source(folder)


def main() -> None:
    """Run the arms and record one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("images", help="a folder of readable images")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--images-in-all", type=int, default=512, help="images are repeated")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    backbone = load_backbone(options.model, "none", torch.device("cpu"))
    size, workers = options.batch_size, options.workers
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "images")
        folder.mkdir()
        source = repeated(open_source(options.images), options.images_in_all, folder)
        arms: dict[str, Callable[[Path], int]] = {
            "forward": lambda _: forward_loop(backbone, size),
            "decode": lambda _: decode_loop(source, backbone, size, workers),
            "encode": lambda out: encode_loop(source, backbone, size, workers, out),
        }
        if clip_retrieval.available():

            def theirs(out: Path) -> int:
                clip_retrieval.encode(backbone, folder, out, size, workers)
                return len(source)

            arms["clip-retrieval"] = theirs
        forward_loop(backbone, size)
        rates: dict[str, list[float]] = {name: [] for name in arms}
        for repeat in range(options.repeats):
            for name, arm in arms.items():
                start = time.perf_counter()
                number = arm(Path(scratch, f"{name}-{repeat}"))
                rates[name].append(number / (time.perf_counter() - start))
            print({name: round(rate[-1], 2) for name, rate in rates.items()}, flush=True)
        row = summary(rates, Path(scratch))
    row |= {"options": vars(options), "jpeg_decoder": decoder(), "threads": torch.get_num_threads()}
    record("encode", row)
    print(json.dumps({name: row[name] for name in ("median", "share", "faster") if name in row}))


def summary(rates: dict[str, list[float]], scratch: Path) -> dict[str, Any]:
    """Medians; of each round the share of the slower half, and against clip-retrieval."""
    rounds = [dict(zip(rates, values, strict=True)) for values in zip(*rates.values(), strict=True)]
    shares = [one["encode"] / min(one["forward"], one["decode"]) for one in rounds]
    row: dict[str, Any] = {
        "images_per_second": rates,
        "median": medians(rates),
        "shares": shares,
        "share": statistics.median(shares),
    }
    if "clip-retrieval" in rates:
        ours, theirs = (
            np.load(next(scratch.glob(f"{arm}-0/img_emb/*.npy"))).astype(np.float64)
            for arm in ("encode", "clip-retrieval")
        )
        cosine = (
            (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        )
        assert cosine.min() > SAME, "the two loops do not give the same features"
        row["least_cosine"] = cosine.min()
        row["faster"] = statistics.median(one["encode"] / one["clip-retrieval"] for one in rounds)
    return row


if __name__ == "__main__":
    main()
