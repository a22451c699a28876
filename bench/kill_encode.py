"""
Killed at random moments, encoding ends in the same bytes: `python -m bench.kill_encode IMAGES`.

One uninterrupted run in its own process, then as many runs as asked that are killed with SIGKILL
at random moments until they end; every folder must equal the first one's, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.common import record


def digest(folder: Path) -> str:
    """Hash of the names and bytes of all files of a folder."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            total.update(f"{file.relative_to(folder)}\0".encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def main() -> int:
    """Kill, continue, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("images")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--shard-rows", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)  # noqa: S311
    same, kills = 0, []
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "transclip_fast.cli", "encode", options.images]
        command += ["--model", options.model, "--pretrained", "none", "--batch-size", "2"]
        command += ["--shard-rows", str(options.shard_rows), "--out"]
        start = time.monotonic()
        subprocess.run([*command, f"{scratch}/whole"], check=True, capture_output=True)  # noqa: S603
        seconds = time.monotonic() - start
        expected = digest(Path(scratch, "whole"))
        for run in range(options.runs):
            out, killed = Path(scratch, f"run-{run}"), 0
            while True:
                process = subprocess.Popen(  # noqa: S603
                    [*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                try:
                    process.wait(timeout=draw.uniform(0.2, 0.9) * seconds)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    killed += 1
                    continue
                break
            kills.append(killed)
            same += digest(out) == expected
            print(f"run {run}: {killed} kills, identical so far {same} of {run + 1}", flush=True)
    record(
        "kill_encode",
        {"options": vars(options), "runs": options.runs, "identical": same, "kills": kills},
    )
    return 0 if same == options.runs else 1


if __name__ == "__main__":
    sys.exit(main())
