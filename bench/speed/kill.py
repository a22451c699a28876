"""Killed at random moments, a command ends in the same bytes.

One uninterrupted run in its own process, then runs that are killed with SIGKILL at random moments
until they end; every folder must equal the first one's, byte for byte (without the times and
memory in run.json and manifest.json). With `--ranks 2 3` torchrun starts one of these numbers of
processes each time; a random one of them is killed, once in a run, and all others must end within
30 seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from bench.common import command_line, make_problem, record

RUN = [sys.executable, "-m", "transclip_fast.cli"]
VARYING = ("seconds", "memory", "warnings")  # of run.json, or of a graph's manifest.json
EARLIEST, LATEST = 0.1, 0.95  # a kill, as a share of an uninterrupted run
ENDING_SECONDS = 30  # that ranks may take to end after one of them was killed


def digest(folder: Path) -> str:
    """Hash of the names and bytes of all files of a folder."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            if file.name in ("run.json", "manifest.json"):
                run = json.loads(content)
                content = json.dumps({x: run[x] for x in run if x not in VARYING}).encode()
            total.update(f"{file.relative_to(folder)}\0".encode())
            total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def run_until_done(
    command: list[str], ranks: list[int], seconds: float, draw: random.Random
) -> list[int]:
    """
    Run a command, killing it at random moments until it ends; where ranks share it, once.

    Returns the number of ranks each time, which is drawn from `ranks`; 1 without torchrun.
    """
    numbers = []
    while True:
        numbers.append(draw.choice(ranks))
        process = subprocess.Popen(  # noqa: S603
            launched(command, numbers[-1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        last = ranks != [1] and len(numbers) > 1
        moment = None if last else draw.uniform(EARLIEST, LATEST) * seconds
        try:
            _, errors = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            if numbers[-1] == 1:
                process.send_signal(signal.SIGKILL)
                process.communicate()
            else:
                kill_a_rank(process, draw)
            continue
        if process.returncode:
            raise RuntimeError(f"ended with {process.returncode}: {errors}")
        return numbers


def launched(command: list[str], ranks: int) -> list[str]:
    """Return a command line of this Python as torchrun starts it, unless it is one process."""
    if ranks == 1:
        return command
    python, *arguments = command
    torchrun = [python, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return [*torchrun, "--master-port", str(free.getsockname()[1]), *arguments]


def kill_a_rank(process: subprocess.Popen[str], draw: random.Random) -> None:
    """Kill one of the processes of torchrun, once there are any; all others must end."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not (ranks := children.read_text().split()):
        time.sleep(0.05)
    if process.poll() is None:
        with suppress(ProcessLookupError):  # it has ended just now
            os.kill(int(draw.choice(ranks)), signal.SIGKILL)
    process.communicate(timeout=ENDING_SECONDS)


def write_features(queries: int, classes: int, dim: int, folder: Path) -> Path:
    """Write a made problem as a FEATURES file."""
    problem = make_problem(queries, classes, dim)
    file = folder / "features.npz"
    np.savez(file, image_features=problem.features, text_features=problem.prototypes)
    return file


def command_of(options: argparse.Namespace, scratch: Path) -> list[str]:
    """Return the command line of `encode`, `graph` or `solve`, but for the folder of `--out`."""
    if options.what == "encode":
        command = [*RUN, "encode", options.images, "--model", options.model]
        command += ["--pretrained", "none", "--batch-size", "2"]
        return [*command, "--shard-rows", str(options.shard_rows), "--out"]
    features = write_features(options.queries, options.classes, options.dim, scratch)
    return [*RUN, options.what, str(features), "--out"]


def main() -> int:
    """Kill, continue, compare, record."""
    parser = command_line(__spec__, __doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    encode = kinds.add_parser("encode")
    encode.add_argument("images")
    encode.add_argument("--model", default="ViT-B-32")
    encode.add_argument("--shard-rows", type=int, default=4)
    graph, solve = kinds.add_parser("graph"), kinds.add_parser("solve")
    for kind in (graph, solve):
        kind.add_argument("--queries", type=int, default=50_000)
        kind.add_argument("--classes", type=int, default=1000)
        kind.add_argument("--dim", type=int, default=256)
        kind.add_argument("--ranks", type=int, nargs="+", default=[1], help="drawn each time")
    for kind in (encode, graph, solve):
        kind.add_argument("--kills", type=int, default=20, help="at least")
        kind.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)  # noqa: S311
    ranks = getattr(options, "ranks", [1])
    same, numbers = 0, list[list[int]]()
    with tempfile.TemporaryDirectory() as scratch:
        command = command_of(options, Path(scratch))
        start = time.monotonic()
        whole = launched([*command, f"{scratch}/whole"], max(ranks))
        subprocess.run(whole, check=True, capture_output=True)  # noqa: S603
        seconds = time.monotonic() - start
        expected = digest(Path(scratch, "whole"))
        while sum(map(len, numbers)) - len(numbers) < options.kills:
            out = Path(scratch, f"run-{len(numbers)}")
            numbers.append(run_until_done([*command, str(out)], ranks, seconds, draw))
            same += digest(out) == expected
            done = f"run {len(numbers)}: on {numbers[-1]} processes, the last one whole"
            print(f"{done}; identical {same} of {len(numbers)}", flush=True)
    kills = [len(found) - 1 for found in numbers]
    row = {
        "what": options.what,
        "options": vars(options),
        "runs": len(kills),
        "identical": same,
        "kills": kills,
    }
    name = options.what if ranks == [1] else "ranks"
    record(f"kill_{name}", row | {"seconds": seconds, "numbers": numbers})
    return 0 if same == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
