"""Tables and plots of the documents, from `bench/results/*.jsonl` alone.

What stands between `<!-- report: NAME -->` and `<!-- end -->` in README.md and bench/README.md is
written here, and so are the plots in bench/plots/. `--check` writes nothing and exits with 1 where
a document or a plot says something else than the results do, or where README states a time or a
memory outside the markers. Of a measurement the newest line counts, and only lines that were
recorded with a clean tree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from bench.common import ROOT
from bench.names import FEATURES, GRAPH_ARMS, SPARSE_ARMS, SPEED_ARMS, most_memory
from bench.tables import (
    LEARNERS,
    NAMINGS,
    Row,
    newest,
    percent,
    seconds,
    size,
    source,
    spread,
    table,
)

DOCUMENTS = ("README.md", "bench/README.md")
MARKED = re.compile(r"(<!-- report: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
STATED = re.compile(r"\d ?(?:[smx]\b|ms\b|[kKMGT]i?B\b|seconds\b|minutes\b|hours\b|times faster\b)")
HERE = Path(__file__).parent


def plot(name: str, text: str) -> str:
    """The Markdown of a plot, seen from README.md."""
    return f"![{text}](bench/plots/{name}.png)"


def labelled(folder: Path) -> list[Row]:
    """Lines of `bench.graph_labels`, in the order of the data's names."""
    rows = newest("graph_labels", "features", folder=folder)
    return sorted(rows, key=lambda row: list(FEATURES).index(row["features"]))


def accuracy(folder: Path) -> str:
    """Accuracy on golden data."""
    rows = [row for row in labelled(folder) if row.get("published")]
    cells = []
    for row in rows:
        published, default = row["published"], row["variants"]["default"]
        cells.append(
            [
                FEATURES[row["features"]],
                f"{row['queries']:,}",
                str(row["classes"]),
                f"{row['zero_shot_accuracy']:.2f}",
                f"{default['accuracy']:.2f}",
                percent(published["same_labels"]),
                f"{published['largest_difference']:.0e}".replace("e-0", "e-"),
            ]
        )
    head = ["features", "N", "K", "zero-shot", "TransCLIP"]
    head += ["labels of the published code", "largest difference of z from its own"]
    return table(head, cells) + "\n\n" + source(rows)


def speed(folder: Path) -> str:
    """Whole solves beside the baseline and the published code."""
    rows = newest("compare", "classes", "dim", "queries", folder=folder)
    arms = [arm for arm in SPEED_ARMS if any(arm in row["arms"] for row in rows)]
    cells = []
    for row in rows:
        gpu = row["machine"]["gpu"]
        line = [f"{row['queries']:,}" + (f" ({gpu})" if gpu else "")]
        line += [f"{row['classes']:,}", str(row["dim"])]
        ours = row.get("default", "transclip_fast")
        for arm in arms:
            done = row["arms"].get(arm)
            cell = f"{seconds(done['median'])}, {size(most_memory(done))}" if done else ""
            line.append(f"**{cell}**" if arm == ours else cell)
        line.append(f"{row['arms'][ours]['times_faster']['baseline']:.2f}")
        cells.append(line)
    head = ["N", "K", "d", *(SPEED_ARMS[arm] for arm in arms), "dense torch's time / the default's"]
    same = min(done["agreement"] for row in rows for done in row["arms"].values())
    text = f"Bold is the default. All arms give the same labels on at least {percent(same)} of rows"
    text += "; the last column divides medians of one run.\n\n"
    return "\n\n".join(
        [plot("speed", "Seconds against N"), table(head, cells), text + source(rows)]
    )


def sparse(folder: Path) -> str:
    """Solves with the graph given."""
    rows = newest("sparse", "classes", "dim", "queries", "logit_scale", folder=folder)
    cells = []
    for row in rows:
        sizes = [f"{row['queries']:,}", f"{row['classes']:,}", f"{row['logit_scale']:g}"]
        reference = next(iter(row["arms"]))
        for arm, done in row["arms"].items():
            same = "" if done["agreement"] is None else percent(done["agreement"])
            same = "reference" if arm == reference else same
            memory = "" if arm == "gemms" else size(done["peak_bytes"])
            took = [SPARSE_ARMS[arm], seconds(done["median"]), memory]
            cells.append([*sizes, *took, f"{done['times_sparse']:.2f}", same])
    head = ["N", "K", "tau", "graph given", "solve", "memory beyond features and graph"]
    head += ["times sparse's", "same labels"]
    return "\n\n".join([plot("sparse", "Time and memory"), table(head, cells), source(rows)])


def graph(folder: Path) -> str:
    """Searches for neighbours."""
    rows = newest("graph", "case", "queries", "dim", folder=folder)
    head = ["N", "d", "search", "time", "recall", "exact FAISS's time / its own"]
    cells = []
    for row in rows:
        sizes = [f"{row['queries']:,}", str(row["dim"])]
        for arm, done in row.get("arms", {}).items():
            recall, faster = done["recall"], done["times_faster_than_faiss_exact"]
            found = [seconds(done["median"]), f"{recall:.4f}", f"{faster:.2f}"]
            cells.append([*sizes, GRAPH_ARMS[arm], *found])
        if row["case"] == "million":
            what = f"`--method ivf`, features in a file, {size(row['peak_bytes'])}"
            recall = f"{row['info']['recall']:.4f}"
            cells.append([*sizes, what, seconds(row["seconds"]), recall, ""])
    return "\n\n".join([plot("graph", "Time against recall"), table(head, cells), source(rows)])


def graph_labels(folder: Path) -> str:
    """What graphs do to labels."""
    rows = labelled(folder)
    cells: dict[str, list[str]] = {}
    for row in rows:
        for variant, found in row["variants"].items():
            changed = f" ({percent(found['changed'])})" if found["changed"] else ""
            # Approximate searches have what they reached, on each data another, in their name.
            name = re.sub(r", recall .*", ", recall of 0.99", variant)
            cells.setdefault(name, []).append(f"{found['accuracy']:.2f}{changed}")
    head = ["graph", *(FEATURES[row["features"]] for row in rows)]
    lines = [[name, *line] for name, line in cells.items()]
    text = "Accuracy, and in brackets the share of labels that differ from the default's."
    return "\n\n".join([text, table(head, lines), source(rows)])


def prompt_learners(folder: Path) -> str:
    """Prompt learners on names that prompts cannot use."""
    rows = newest("prompt_learners", "naming", "learner", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.prompt_learners`."
    order = {x: place for place, x in enumerate([*NAMINGS, *LEARNERS])}
    rows.sort(key=lambda row: (order[row["naming"]], order[row["learner"]]))
    head = ["digits are called by", "learner", "zero-shot", "learner alone", "TransCLIP on top"]
    cells = [
        [
            NAMINGS[row["naming"]],
            LEARNERS[row["learner"]],
            *(spread(row[x]) for x in ("zero_shot", "alone", "with_transclip")),
        ]
        for row in rows
    ]
    draws, shots, queries, own = (rows[0][x] for x in ("alone", "shots", "queries", "own_names"))
    text = (
        f"Accuracy on {queries} digits, mean and deviation over {len(draws)} draws of {shots} "
        f"shots a class; by their own names zero-shot is right on {own:.2f} % of all."
    )
    return "\n\n".join([text, table(head, cells), source(rows)])


def stream(folder: Path) -> str:
    """Features that stay on disk."""
    rows = newest("stream", "classes", "dim", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.stream`."
    head = ["N", "K", "d", "time", "planned", "time a row", "peak", "planned"]
    head += ["features", "read"]
    cells = []
    for row in rows:
        for n, done in zip(row["queries"], row["sizes"], strict=True):
            line = [f"{n:,}", f"{row['classes']:,}", str(row["dim"])]
            line += [seconds(done["seconds"]), seconds(done["planned_seconds"])]
            line += [f"{1e6 * done['seconds'] / n:.0f} µs"]
            line += [size(done["peak_bytes"]), size(done["planned_bytes"])]
            times = done["read_bytes"] / done["feature_bytes"]
            cells.append([*line, size(done["feature_bytes"]), f"{times:.1f} times"])
    return "\n\n".join([plot("stream", "Time and memory"), table(head, cells), source(rows)])


def encode(folder: Path) -> str:
    """Encoding beside its two halves."""
    lines = sorted(newest("encode", "command", folder=folder), key=lambda row: str(row["date"]))
    rows = list({row["options"]["model"]: row for row in lines}.values())
    arms = {
        "forward": "model alone",
        "decode": "decoding alone",
        "encode": "both and writing",
        "clip-retrieval": "clip-retrieval",
    }
    shown = [arm for arm in arms if any(arm in row["median"] for row in rows)]
    cells = []
    for row in rows:
        rates = (row["median"].get(arm) for arm in shown)
        found = ["" if rate is None else f"{rate:.1f} images/s" for rate in rates]
        cells.append([row["options"]["model"], *found, f"{100 * row['share']:.0f} %"])
    head = ["model", *(arms[arm] for arm in shown), "share of the slower half"]
    return table(head, cells) + "\n\n" + source(rows)


def kills(folder: Path) -> str:
    """Killed commands end in the same bytes."""
    head = ["command", "kills", "runs", "ended in the same bytes"]
    cells, rows = [], []
    for name in ("encode", "solve"):
        for row in newest(f"kill_{name}", folder=folder):
            rows.append(row)
            numbers = sum(row["kills"]), row["runs"], row["identical"]
            cells.append([f"`{name}`", *map(str, numbers)])
    return table(head, cells) + "\n\n" + source(rows)


def scaling(folder: Path) -> str:
    """Exponents of time and memory, and labels of shorter lists and schedules."""
    rows = newest("scaling", "against", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.scaling`."
    grown: list[list[str]] = []
    labels: list[list[str]] = []
    for row in rows:
        for arm, fits in row.get("exponents", {}).items():
            done = [x[row["against"]] for x in row["rows"]]
            what = f"{row['against']}, {done[0]:,} to {done[-1]:,}"
            powers = [f"{fits[x]:.1f}" for x in ("knn", "solve", "bytes")]
            grown.append([what, SPEED_ARMS[arm], *powers])
        sizes = [f"{row[x]:,}" for x in ("queries", "classes", "dim")]
        for option in row.get("options", []):
            names = {"candidates": "C", "rank": "R", "max_iter": "outer", "inner_iter": "sweeps"}
            what = ", ".join(f"{names[x]} {option[x]}" for x in names if x in option)
            found = [percent(option["agreement"]), f"{100 * option['accuracy']:.2f} %"]
            labels.append([*sizes, what, *found])
    parts = []
    if grown:
        parts.append(table(["against", "arm", "search", "solve", "memory"], grown))
    if labels:
        head = ["N", "K", "d", "option", "labels of dense, 10 x 5", "accuracy"]
        parts.append(table(head, labels))
    return "\n\n".join([*parts, source(rows)])


def gpu(folder: Path) -> str:
    """The suite of one GPU."""
    rows = newest("gpu_suite", "operation", "arm", folder=folder)
    if not rows:
        return (
            "No GPU has run this yet. What is expected of one is predicted only, from counts of "
            "bytes and\noperations: [bench/gpu_predictions.md](bench/gpu_predictions.md)."
        )
    cells = []
    for row in rows:
        share = (
            f"{row['rate']:.0f} {row['unit']}, {100 * row['share']:.0f} %" if row["unit"] else ""
        )
        cells.append([row["operation"], row["arm"], f"{row['milliseconds']:.3g} ms", share])
    head = ["operation", "by", "time", "rate, share of the ceiling"]
    return table(head, cells) + "\n\n" + source(rows)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy,
    "speed": speed,
    "sparse": sparse,
    "graph": graph,
    "graph-labels": graph_labels,
    "prompt-learners": prompt_learners,
    "stream": stream,
    "encode": encode,
    "kills": kills,
    "scaling": scaling,
    "gpu": gpu,
}


def rewritten(text: str, folder: Path) -> str:
    """A document with what its markers hold as the results in `folder` say."""

    def block(found: re.Match[str]) -> str:
        name = found[2]
        if name not in BLOCKS:
            raise SystemExit(f"no report is named {name!r}; there are {', '.join(BLOCKS)}")
        return f"{found[1]}{BLOCKS[name](folder)}\n{found[4]}"

    return MARKED.sub(block, text)


def stated(text: str) -> list[str]:
    """Lines of README that give a time or a memory outside the markers and outside code."""
    free = CODE.sub("", MARKED.sub("", text))
    return [line for line in free.splitlines() if STATED.search(line)]


def digest(rows: list[Row]) -> str:
    """What a plot carries of the lines and of the code that it was drawn from."""
    code = "".join((HERE / f"{x}.py").read_text() for x in ("drawing", "names"))
    return hashlib.sha256((code + json.dumps(rows, sort_keys=True)).encode()).hexdigest()


def drawn_from(folder: Path) -> dict[str, list[Row]]:
    """The lines of each plot; none for a plot that has nothing to show yet."""
    return {
        "speed": newest("compare", "classes", "dim", "queries", folder=folder),
        "sparse": newest("sparse", "classes", "dim", "queries", "logit_scale", folder=folder),
        "graph": [
            row for row in newest("graph", "case", "queries", "dim", folder=folder) if "arms" in row
        ],
        "stream": newest("stream", "classes", "dim", folder=folder),
    }


def stale_plots(folder: Path, plots: Path) -> list[str]:
    """Names of the plots that are missing or were drawn from other lines."""
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
    """What the documents and plots under `root` say otherwise than its results, one line each."""
    folder, wrong = root / "bench" / "results", []
    for name in DOCUMENTS:
        text = (root / name).read_text()
        if rewritten(text, folder) != text:
            wrong.append(f"{name} differs from bench/results")
    wrong += [
        f"README.md states outside its markers: {x}"
        for x in stated((root / DOCUMENTS[0]).read_text())
    ]
    wrong += [
        f"bench/plots/{x}.png is stale" for x in stale_plots(folder, root / "bench" / "plots")
    ]
    return wrong


def write(root: Path) -> None:
    """Write the documents' figures and the plots under `root`."""
    folder = root / "bench" / "results"
    for name in DOCUMENTS:
        file = root / name
        file.write_text(rewritten(file.read_text(), folder))
    stale = stale_plots(folder, root / "bench" / "plots")
    for name, rows in drawn_from(folder).items():
        if name in stale:
            from bench.drawing import draw  # only here is matplotlib needed

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
