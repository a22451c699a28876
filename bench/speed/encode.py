"""How close encoding comes to its two halves.

Arms over the same files, interleaved: the model alone over one batch again and again, the decoding
workers alone, the whole of `encode`, and, where `TRANSCLIP_CLIP_RETRIEVAL` names a checkout, the
loop of clip-retrieval around the same network. The ceiling is the slower of the two halves.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import command_line, in_turns, medians, record
from bench.rivals import clip_retrieval
from transclip_fast.encode.batch_size import random_images
from transclip_fast.encode.feed import feed
from transclip_fast.encode.folder import encode_source
from transclip_fast.encode.models import Backbone, load_backbone
from transclip_fast.encode.pixels import decoder
from transclip_fast.encode.sources import Source, open_source

FORWARD_BATCHES = 3
SAME_COSINE = 0.999  # least cosine of a feature with clip-retrieval's


def forward_loop(backbone: Backbone, size: int) -> int:
    """Run the image tower alone and return the number of images."""
    images = random_images(backbone, size)
    with torch.inference_mode():
        for _ in range(FORWARD_BATCHES):
            backbone.embed(images, size)
    return FORWARD_BATCHES * size


def decode_loop(source: Source, backbone: Backbone, size: int, workers: int) -> int:
    """Run the decoding workers alone and return the number of images."""
    rows = range(len(source))
    batches = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    return sum(len(batch) for batch in feed(source, backbone, batches, workers))


def encode_loop(source: Source, backbone: Backbone, size: int, workers: int, out: Path) -> int:
    """Decode, embed and write the folder; return the number of images."""
    encoded = encode_source(source, backbone, out, None, batch_size=size, workers=workers)
    assert not encoded.failures
    return len(source)


def repeated(listed: Source, number: int, folder: Path) -> Source:
    """Return a folder of `number` links to the files of a source, which repeat in turn."""
    for row in range(number):
        file = Path(listed.files[row % len(listed)]).resolve()
        (folder / f"{row:06}{file.suffix}").symlink_to(file)
    return open_source(folder)


def main() -> None:
    """Run the arms and record one line."""
    parser = command_line(
        __spec__, __doc__, model="ViT-B-32", images_in_all=512, batch_size=64, workers=2, repeats=3
    )
    parser.add_argument("images", help="a folder of readable images, which are repeated")
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

            def clip_retrieval_loop(out: Path) -> int:
                clip_retrieval.encode(backbone, folder, out, size, workers)
                return len(source)

            arms["clip-retrieval"] = clip_retrieval_loop

        def rate(arm: str) -> float:
            out = Path(scratch, f"{arm}-{len(list(Path(scratch).glob(f'{arm}-*')))}")
            start = time.perf_counter()
            found = arms[arm](out) / (time.perf_counter() - start)
            print(f"{arm}: {found:.2f} images/s", flush=True)
            return found

        forward_loop(backbone, size)
        row = summary(in_turns(rate, arms, options.repeats), Path(scratch))
    row |= {"options": vars(options), "jpeg_decoder": decoder(), "threads": torch.get_num_threads()}
    record("encode", row)
    print(json.dumps({name: row[name] for name in ("median", "share", "faster") if name in row}))


def summary(rates: dict[str, list[float]], scratch: Path) -> dict[str, Any]:
    """Return the medians and, of each round, the share of the slower half and of clip-retrieval."""
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
        assert cosine.min() > SAME_COSINE, "the two loops do not give the same features"
        row["least_cosine"] = cosine.min()
        row["faster"] = statistics.median(one["encode"] / one["clip-retrieval"] for one in rounds)
    return row


if __name__ == "__main__":
    main()
