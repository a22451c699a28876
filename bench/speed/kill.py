"""Killed at random moments, a command ends in the same bytes.

One uninterrupted run in its own process, then runs that are killed with SIGKILL at random moments
until they end; every folder must equal the first one's, byte for byte (without the times and
memory in run.json).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.common import command_line, make_problem, record

RUN = [sys.executable, "-m", "transclip_fast.cli"]
VARYING = ("seconds", "memory", "warnings")  # of run.json
EARLIEST, LATEST = 0.1, 0.95  # a kill, as a share of an uninterrupted run


def digest(folder: Path) -> str:
    """Hash of the names and bytes of all files of a folder."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            if file.name == "run.json":
                run = json.loads(content)
                content = json.dumps({x: run[x] for x in run if x not in VARYING}).encode()
            total.update(f"{file.relative_to(folder)}\0".encode())
            total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def run_until_done(command: list[str], seconds: float, draw: random.Random) -> int:
    """Run a command, killing it at random moments until it ends; return the number of kills."""
    killed = 0
    while True:
        process = subprocess.Popen(  # noqa: S603
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            _, errors = process.communicate(timeout=draw.uniform(EARLIEST, LATEST) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
            continue
        if process.returncode:
            raise RuntimeError(f"ended with {process.returncode}: {errors}")
        return killed


def write_features(queries: int, classes: int, dim: int, folder: Path) -> Path:
    """Write a made problem as a FEATURES file."""
    problem = make_problem(queries, classes, dim)
    file = folder / "features.npz"
    np.savez(file, image_features=problem.features, text_features=problem.prototypes)
    return file


def command_of(options: argparse.Namespace, scratch: Path) -> list[str]:
    """Return the command line of `encode` or `solve` without the folder behind its `--out`."""
    if options.what == "encode":
        command = [*RUN, "encode", options.images, "--model", options.model]
        command += ["--pretrained", "none", "--batch-size", "2"]
        return [*command, "--shard-rows", str(options.shard_rows), "--out"]
    features = write_features(options.queries, options.classes, options.dim, scratch)
    return [*RUN, "solve", str(features), "--out"]


def main() -> int:
    """Kill, continue, compare, record."""
    parser = command_line(__spec__, __doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    encode = kinds.add_parser("encode")
    encode.add_argument("images")
    encode.add_argument("--model", default="ViT-B-32")
    encode.add_argument("--shard-rows", type=int, default=4)
    solve = kinds.add_parser("solve")
    solve.add_argument("--queries", type=int, default=50_000)
    solve.add_argument("--classes", type=int, default=1000)
    solve.add_argument("--dim", type=int, default=256)
    for kind in (encode, solve):
        kind.add_argument("--kills", type=int, default=20, help="at least")
        kind.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)  # noqa: S311
    same, kills = 0, list[int]()
    with tempfile.TemporaryDirectory() as scratch:
        command = command_of(options, Path(scratch))
        start = time.monotonic()
        subprocess.run([*command, f"{scratch}/whole"], check=True, capture_output=True)  # noqa: S603
        seconds = time.monotonic() - start
        expected = digest(Path(scratch, "whole"))
        while sum(kills) < options.kills:
            out = Path(scratch, f"run-{len(kills)}")
            kills.append(run_until_done([*command, str(out)], seconds, draw))
            same += digest(out) == expected
            print(
                f"run {len(kills)}: {kills[-1]} kills, identical {same} of {len(kills)}", flush=True
            )
    row = {"options": vars(options), "runs": len(kills), "identical": same, "kills": kills}
    record(f"kill_{options.what}", row | {"seconds": seconds})
    return 0 if same == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
