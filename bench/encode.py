"""
How close encoding comes to its two halves: `python -m bench.encode IMAGES`.

Three arms over the same images, interleaved: the model alone over one batch again and again, the
decoding workers alone, and `encode_images`. The ceiling is the slower of the two halves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.common import medians, record
from transclip_fast.cli.common import Stages
from transclip_fast.cli.encode import encode_with
from transclip_fast.encode.encoder import image_loader
from transclip_fast.encode.models import Backbone, load_backbone
from transclip_fast.encode.sources import Source, open_source


def forward_loop(backbone: Backbone, batch: torch.Tensor, batches: int) -> float:
    """Images a second of the image tower alone."""
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(batches):
            backbone.model.encode_image(batch)
        return len(batch) * batches / (time.perf_counter() - start)


def decode_loop(source: Source, backbone: Backbone, batch_size: int, workers: int) -> float:
    """Images a second of the decoding workers alone."""
    rows = range(len(source))
    batches = [list(rows[i : i + batch_size]) for i in range(0, len(source), batch_size)]
    loader = image_loader(source, backbone, batches, workers)
    start = time.perf_counter()
    decoded = sum(len(kept) for _, kept, _ in loader)
    return decoded / (time.perf_counter() - start)


def encode_loop(source: Source, backbone: Backbone, batch_size: int, workers: int) -> float:
    """Images a second of the whole: decoding, embedding, writing the folder."""
    folder = Path(tempfile.mkdtemp())
    try:
        start = time.perf_counter()
        encode_with(
            source,
            backbone,
            str(folder / "features"),
            None,
            Stages(),
            batch_size=batch_size,
            workers=workers,
        )
        seconds = time.perf_counter() - start
        written = np.load(folder / "features/img_emb/img_emb_00000.npy")
        assert len(written) == len(source), "rows are missing"
    finally:
        shutil.rmtree(folder)
    return len(source) / seconds


def main() -> None:
    """Run the three arms and record one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("images", help="a folder of readable images")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--images-in-all", type=int, default=512, help="images are repeated")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    backbone = load_backbone(options.model, "none", torch.device("cpu"))
    listed = open_source(options.images)
    repeat = -(-options.images_in_all // len(listed))
    source = Source(
        "list",
        [f"{i}/{key}" for i in range(repeat) for key in listed.keys][: options.images_in_all],
        (listed.files * repeat)[: options.images_in_all],
    )
    batch, *_ = next(iter(image_loader(source, backbone, [list(range(options.batch_size))], 0)))
    forward_loop(backbone, batch, 1)
    rates: dict[str, list[float]] = {"forward": [], "decode": [], "encode": []}
    for _ in range(options.repeats):
        rates["forward"].append(forward_loop(backbone, batch, 2))
        rates["decode"].append(decode_loop(source, backbone, options.batch_size, options.workers))
        rates["encode"].append(encode_loop(source, backbone, options.batch_size, options.workers))
    middle = medians(rates)
    share = middle["encode"] / min(middle["forward"], middle["decode"])
    row = {"options": vars(options), "images_per_second": rates, "median": middle, "share": share}
    record("encode", row)
    print(json.dumps({"median images/s": middle, "share of the slower half": round(share, 3)}))


if __name__ == "__main__":
    main()
