"""The campaign: many mutated files, counted by format and outcome; see `bench.fuzz`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from bench.common import record
from bench.fuzz.seeds import FORMATS
from bench.fuzz.trial import ACCEPTED, REFUSED
from bench.processes import Process

CHUNK = 50  # trials a call
NO_FAULT = (ACCEPTED, REFUSED)
SHOWN_EXAMPLES = 3  # of a kind of fault


def main() -> None:
    """Run the campaign, print the table and record; exit code 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="mutated files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], choices=FORMATS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first, to repeat one")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.count)
    chunks = [list(numbers[start : start + CHUNK]) for start in range(0, options.count, CHUNK)]
    with tempfile.TemporaryDirectory() as folder:

        def part(k: int) -> list[dict[str, Any]]:
            own = chunks[k :: options.workers]
            return list(_outcomes(own, Path(folder, str(k)), options.seed, options.only))

        with ThreadPoolExecutor(options.workers) as threads:
            outcomes = list(chain.from_iterable(threads.map(part, range(options.workers))))
    faults = report(outcomes)
    counts = Counter((outcome["format"], outcome["kind"]) for outcome in outcomes)
    formats = {name: {k: n for (of, k), n in counts.items() if of == name} for name in FORMATS}
    found = {"seed": options.seed, "first": options.first, "faults": faults, "formats": formats}
    record("fuzz", found)
    sys.exit(1 if faults else 0)


def _outcomes(
    chunks: Sequence[list[int]], root: Path, seed: int, only: list[str]
) -> Iterator[dict[str, Any]]:
    """Outcomes of trials in one process, or a new one after a trial that ended it."""
    pending, process, started = [list(chunk) for chunk in chunks], None, 0
    while pending:
        chunk = pending.pop(0)
        if process is None:
            started += 1
            process = Process(threads=1)
        folder = str(root / str(started))
        try:
            found = process.call(
                "bench.fuzz.trial:run_numbers", numbers=chunk, root=folder, seed=seed, only=only
            )
        except RuntimeError as error:
            process = None
            if len(chunk) > 1:
                half = len(chunk) // 2
                pending[:0] = [chunk[:half], chunk[half:]]
                continue
            lines = [line for line in str(error).splitlines() if line.strip()]
            found = [
                {"number": chunk[0], "format": "?", "kind": "died", "detail": " ".join(lines[:6])}
            ]
        for outcome in found:
            if outcome["kind"] not in NO_FAULT:
                print(
                    outcome["number"],
                    outcome["format"],
                    outcome["kind"],
                    outcome["detail"],
                    file=sys.stderr,
                    flush=True,
                )
        yield from found
    if process is not None:
        process.close()


def report(outcomes: Sequence[dict[str, Any]]) -> int:
    """Print counts by format and outcome, and each kind of fault once; the number of faults."""
    table = Counter((outcome["format"], outcome["kind"]) for outcome in outcomes)
    for (name, kind), number in sorted(table.items()):
        print(f"{name:12} {kind:10} {number:8,}")
    faults = [outcome for outcome in outcomes if outcome["kind"] not in NO_FAULT]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for fault in faults:
        place = fault["detail"].rpartition(" at ")[2] if fault["kind"] == "traceback" else ""
        kinds.setdefault(f"{fault['kind']} {fault['format']} {place}", []).append(fault)
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        numbers = ", ".join(str(fault["number"]) for fault in found[:SHOWN_EXAMPLES])
        print(f"{len(found):6,} {kind}: {found[0]['detail']} (--first {numbers})")
    print(f"{len(outcomes):,} mutated files, {len(faults):,} faults")
    return len(faults)


if __name__ == "__main__":
    main()
