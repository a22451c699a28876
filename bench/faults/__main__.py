"""Every file operation of every command fails once: what stands then, and the same command again.

A preloaded library counts the operations under the command's folder and lets the nth fail: with
ENOSPC, and then all later ones that take space; with EIO, that one alone; with SIGKILL before it
(KILL) or after it, of a write after half of its bytes (TORN); READ is EIO where files are read. A
command must end with exit code 2 and one line, or whole; what had its output's name must be the old
or the new, and the same command, run again, must end in the bytes of a run without faults and leave
nothing else behind.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bench.common import print_table, record
from bench.faults.commands import CASES
from bench.faults.library import FAULTS, build
from bench.processes import Process

COUNTS = ("operations", "tried", "refused", "finished", "killed", "crashed", "hung")
SHOWN_CHARACTERS = 2000  # of a problem


def main() -> int:
    """Try every command, print and record."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--command", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--errors", nargs="+", choices=[*FAULTS], default=[*FAULTS])
    parser.add_argument("--every", type=int, default=1, help="of so many operations one fails")
    options = parser.parse_args()
    rows, failed = list[list[str]](), False
    with tempfile.TemporaryDirectory() as scratch:
        environment = {"LD_PRELOAD": str(build(Path(scratch)))}
        for name in options.command:
            with Process(threads=1, environment=environment) as process:
                faults = process.call(
                    "bench.faults.trials:try_command",
                    name=name,
                    every=dict.fromkeys(options.errors, options.every),
                )
            problems = [
                f"{name}, {fault}: {problem[:SHOWN_CHARACTERS]}"
                for fault, found in faults.items()
                for problem in found.pop("problems")
            ]
            print("\n".join([f"{name}: {len(problems)} problems", *problems]), flush=True)
            for fault, found in faults.items():
                rows.append([name, fault, *(str(found.get(x, 0)) for x in COUNTS)])
            if not problems:
                record("faults", {"case": name, "every": options.every, "faults": faults})
            failed = failed or bool(problems)
    print_table(["command", "fault", *COUNTS], rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
