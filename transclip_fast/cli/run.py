"""`transclip-fast run`: images and class names to labels; each stage's folder is kept."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from transclip_fast.cli import options, session
from transclip_fast.cli.command import Command
from transclip_fast.cli.encode import encode_options, encode_progress, report, warn_of_random
from transclip_fast.cli.evaluate import describe_evaluation, evaluate_result
from transclip_fast.cli.graph import (
    SEARCH_OPTIONS,
    GraphSearch,
    kept_graph,
    search_leftovers,
    search_of,
)
from transclip_fast.cli.plan import Plan, plan_of_size
from transclip_fast.cli.report import describe_report
from transclip_fast.cli.solution import Output, Solving, solve_features, solve_leftovers
from transclip_fast.cli.summary import describe_solution, sorted_into
from transclip_fast.device import resolve_device
from transclip_fast.encode.folder import encode_images
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.ranks import current_ranks, joined
from transclip_fast.report.page import check_page_file, write_report
from transclip_fast.report.sorting import check_target
from transclip_fast.store.atomic import clean
from transclip_fast.store.features import Features, load_features
from transclip_fast.store.results import CSV_FILE, TRANSCLIP, load_mixture, load_result
from transclip_fast.version import __version__

REPORT = "report.html"
SOLVE_OPTIONS = ("class_cost", "reject", "memory", "device", "csv")  # of `solve`, beside the graph


@click.command(
    "run",
    cls=Command,
    shown="pretrained classes templates labels_from_folders class_cost memory device csv sort_into",
)
@click.argument("images", type=options.PATH)
@options.out_option
@encode_options
@options.search_options
@options.parameter_option("class_cost")
@options.reject_option
@options.parameter_option("memory")
@options.device_option
@options.csv_option
@options.sort_option
@options.json_option
def command(
    images: str,
    out: str,
    class_cost: bool | str,
    reject: float | None,
    memory: str | None,
    strict: bool,
    csv: bool,
    sort_into: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Label IMAGES with the class names in --classes: encode, graph, solve, report.

    IMAGES is a folder of images, ImageNet's folders, a .txt, .csv or .parquet list of paths,
    webdataset tars, or a .json of splits as CoOp has them. --out receives the folders features/,
    graph/ and result/, and report.html, which shows the result in a browser. Run the same command
    again after a crash, or after images were added, removed or replaced: it does what is missing.

    \b
    Example:
      transclip-fast run photos --classes names.txt --model ViT-B-32 --pretrained openai --out out
    \f
    After a crash it skips the stages that are done and resumes the one that is not. Where images
    have changed it encodes those that are new or changed, and computes the graph and the labels
    anew. Started by torchrun, processes that see the same folders share every stage but the report.
    """
    if values["classes"] is None and Path(images).suffix.lower() != ".json":
        raise InputError("run needs --classes: a file of names, or imagenet")
    folder = Path(out)
    check_page_file(folder / REPORT)
    if sort_into is not None:
        check_target(sort_into, [images, folder / "features", folder / "graph", folder / "result"])
    model = TransCLIP(device=values["device"], memory=memory, class_cost=class_cost)
    planned: list[Plan] = []
    encoding = {k: value for k, value in values.items() if k not in SEARCH_OPTIONS}

    def print_plan(*shape: int) -> None:
        planned.append(plan_of_size(shape, model, search.planned, ranks.size))
        if ranks.leads and not as_json:
            session.say(planned[0].line())

    with (
        joined(together=True) as ranks,
        session.collected_warnings({}, shown=ranks.leads) as messages,
    ):
        search = search_of(values, model.n_neighbors)
        with encode_progress() as progress:
            encoded = encode_images(
                images, folder / "features", progress=progress, on_sizes=print_plan, **encoding
            )
        encode_summary, encode_text = report(encoded)
        warn_of_random(messages, values["pretrained"], "labels", shown=ranks.leads)
        stages = session.Stages(encode_summary["seconds"])
        again = options.given_options(str(folder / "result"), SOLVE_OPTIONS)
        output = Output(reject, csv, options=[*again], warnings=messages)
        quiet = as_json or bool(planned)
        solve_summary = solve_folder(folder, model, search, stages, output, quiet=quiet)
        if not ranks.leads:
            return
        solve_text = describe_folder(folder, solve_summary)
        page = write_report(folder / "result", folder / REPORT)
        found, lines = sorted_into(sort_into, folder / "result", folder / "features")
    summary = {
        **solve_summary,
        "failures": encode_summary["failures"],
        "throughput": encode_summary["throughput"],
        "seconds": {**encode_summary["seconds"], **solve_summary["seconds"]},
        "warnings": [*dict.fromkeys([*messages, *solve_summary["warnings"]])],
        "report": str(folder / REPORT),
        **found,
    }
    lines = [encode_text, solve_text, describe_report(page, folder / REPORT), *lines]
    session.print_summary(summary, "\n".join(lines), as_json)
    if strict and encoded.failures:
        sys.exit(1)


def solve_folder(
    folder: Path,
    model: TransCLIP,
    search: GraphSearch | None = None,
    stages: session.Stages | None = None,
    output: Output | None = None,
    *,
    quiet: bool = True,
) -> dict[str, Any]:
    """
    Solve folder/features into folder/graph and folder/result; run.json, as of `solve_features`.

    `stages` has the time of what went before, and receives that of what is done now.
    """
    ranks = current_ranks()
    stages, output = stages or session.Stages(), output or Output()
    features = load_features(folder / "features")
    result = folder / "result"
    search = search or GraphSearch(model.n_neighbors, resolve_device(model.device))
    graph = kept_graph(folder / "graph", features, search, stages)
    run = _finished_run(result, features, model, graph, output)
    kept = all(ranks.all_gather(run is not None))
    if run is None or not kept:
        found = {"option": "--graph", "file": options.path_from(str(result), str(folder / "graph"))}
        output = replace(output, options=[found, *output.options])
        solving = Solving(features, str(result), stages, output)
        return solve_features(solving, model, graph, quiet=quiet)
    if ranks.leads:
        clean(folder / "graph", search_leftovers(folder / "graph"))
        clean(result, solve_leftovers(str(result)))
    return run


def describe_folder(folder: Path, run: dict[str, Any]) -> str:
    """The run.json of `solve_folder` as text, with the evaluation where there are labels."""
    result = str(folder / "result")
    text = describe_solution(run, result)
    if run["accuracy"] is not None:
        text = f"{text}\n\n{describe_evaluation(evaluate_result(result))}"
    return text


def _finished_run(
    result: Path, features: Features, model: TransCLIP, graph: NeighborGraph, output: Output
) -> dict[str, Any] | None:
    """
    run.json of a result that is whole and has these inputs, parameters, graph and output, or None.

    One of another version of the package warns, and is none: its labels may be others.
    """
    try:
        loaded = load_result(result, ("row", "source_row", "key"))
        load_mixture(result)
    except InputError:
        return None
    run = loaded.run
    if not loaded.has_rows_of(features):  # names of images change without the hashes of arrays
        return None
    if output.csv and not (result / CSV_FILE).is_file():
        return None
    versions = run.get("versions")
    version = versions.get("transclip_fast") if isinstance(versions, dict) else None
    if version != __version__:
        warnings.warn(
            f"{result}: was solved by version {version}; {__version__} solves it again",
            stacklevel=2,
        )
        return None
    known = {
        "kind": "solve",
        "method": TRANSCLIP,
        "head": None,
        "features": options.path_from(str(result), features.path),
        "encoder": features.encoder,
        "maps": features.maps,
        "parameters": options.requested(model),
        "inputs_sha256": features.inputs_sha256(),
        "class_names": features.class_names,
        "graph": {"n_neighbors": model.n_neighbors, **graph.info},
        "graph_sha256": graph.sha256(),
        "reject": output.reject,
    }
    return run if known.items() <= run.items() else None
