"""Tables and plots of the documents, from `bench/results/*.jsonl` alone.

The text between `<!-- report: NAME -->` and `<!-- end -->` in README.md, docs/ and bench/README.md
and the plots in bench/plots/ are generated. `--check` writes nothing and exits with 1 where a
document or a plot differs from the results, or where README or a page of docs/ states a time or a
memory outside the markers. Of each measurement the newest line counts, among lines recorded with a
clean tree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

from bench import (
    correction_tables,
    head_tables,
    million_tables,
    rank_tables,
    rival_tables,
    tables,
    wild_tables,
)
from bench.common import ROOT
from bench.faults import tables as fault_tables
from bench.tables import Row, compared, newest

BLOCKS = (
    tables.BLOCKS
    | head_tables.BLOCKS
    | wild_tables.BLOCKS
    | rival_tables.BLOCKS
    | rank_tables.BLOCKS
    | correction_tables.BLOCKS
    | fault_tables.BLOCKS
    | million_tables.BLOCKS
)
DOCUMENTS = (
    "README.md",
    "docs/method.md",
    "docs/methods.md",
    "docs/scale.md",
    "docs/speed.md",
    "bench/README.md",
)
MARKED = re.compile(r"(<!-- report: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
STATED = re.compile(r"\d ?(?:[smx]\b|ms\b|[kKMGT]i?B\b|seconds\b|minutes\b|hours\b|times faster\b)")
HERE = Path(__file__).parent


def rewritten(text: str, folder: Path, name: str) -> str:
    """Return the document `name` with the text between its markers generated from `folder`."""
    up = "../" if name.startswith("docs/") else ""  # links are from README.md

    def block(found: re.Match[str]) -> str:
        block_name = found[2]
        if block_name not in BLOCKS:
            raise SystemExit(f"no report is named {block_name!r}; there are {', '.join(BLOCKS)}")
        made = BLOCKS[block_name](folder).replace("](bench/", f"]({up}bench/")
        return f"{found[1]}{made}\n{found[4]}"

    return MARKED.sub(block, text)


def stated(text: str) -> list[str]:
    """Return the lines that state a time or a memory outside markers and outside code."""
    free = CODE.sub("", MARKED.sub("", text))
    return [line for line in free.splitlines() if STATED.search(line)]


def digest(rows: list[Row]) -> str:
    """Return a hash of the lines and of the code that a plot is drawn from."""
    code = "".join((HERE / f"{x}.py").read_text() for x in ("drawing", "names"))
    return hashlib.sha256((code + json.dumps(rows, sort_keys=True)).encode()).hexdigest()


def drawn_from(folder: Path) -> dict[str, list[Row]]:
    """Return the lines of each plot, none where nothing is recorded yet."""
    return {
        "speed": compared(folder),
        "sparse": newest("sparse", "classes", "dim", "queries", "logit_scale", folder=folder),
        "graph": [
            row for row in newest("graph", "case", "queries", "dim", folder=folder) if "arms" in row
        ],
        "stream": million_tables.streamed(folder),
    }


def stale_plots(folder: Path, plots: Path) -> list[str]:
    """Return the names of plots that are missing or were drawn from other lines."""
    from PIL import Image

    found = []
    for name, rows in drawn_from(folder).items():
        file = plots / f"{name}.png"
        if rows and not file.exists():
            found.append(name)
        elif rows:
            with Image.open(file) as image:
                if image.info.get("Description") != digest(rows):
                    found.append(name)
    return found


def check(root: Path) -> list[str]:
    """Return each difference of the documents and plots under `root` from its results."""
    folder, wrong = root / "bench" / "results", []
    for name in DOCUMENTS:
        text = (root / name).read_text()
        if rewritten(text, folder, name) != text:
            wrong.append(f"{name} differs from bench/results")
    wrong += [
        f"{file.relative_to(root)} states outside its markers: {x}"
        for file in (root / "README.md", *sorted((root / "docs").glob("*.md")))
        for x in stated(file.read_text())
    ]
    wrong += [
        f"bench/plots/{x}.png is stale" for x in stale_plots(folder, root / "bench" / "plots")
    ]
    return wrong


def write(root: Path) -> None:
    """Write the generated text of the documents, and the stale plots, under `root`."""
    folder = root / "bench" / "results"
    for name in DOCUMENTS:
        file = root / name
        file.write_text(rewritten(file.read_text(), folder, name))
    stale = stale_plots(folder, root / "bench" / "plots")
    for name, rows in drawn_from(folder).items():
        if name in stale:
            from bench.drawing import draw  # needs matplotlib, which nothing else here does

            draw(name, rows, root / "bench" / "plots" / f"{name}.png", digest(rows))
            print(f"drew bench/plots/{name}.png")


def main(arguments: list[str] | None = None) -> int:
    """Write, or check, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    options = parser.parse_args(arguments)
    if not options.check:
        write(ROOT)
    wrong = check(ROOT)
    for line in wrong:
        print(line)
    if wrong and options.check:
        print("run `python -m bench.report`")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
