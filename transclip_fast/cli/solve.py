"""`transclip-fast solve`: features to labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import click
import numpy as np

from transclip_fast.cli import options, session
from transclip_fast.cli.command import Command
from transclip_fast.cli.graph import GraphSearch, refuse_search, search_of
from transclip_fast.cli.head import apply_head, read_choice
from transclip_fast.cli.method import (
    describe_result,
    method_of,
    method_options,
    neighbors_of,
    solve_with_method,
)
from transclip_fast.cli.session import command_line
from transclip_fast.cli.solution import Output, Solving, solve_features
from transclip_fast.cli.summary import describe_solution, sorted_into
from transclip_fast.cli.towers import TOWER, tower_options
from transclip_fast.data.checks import as_labels
from transclip_fast.errors import InputError
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.heads import HEADS
from transclip_fast.heads.files import StoredHead
from transclip_fast.ranks import ALONE, Ranks, joined
from transclip_fast.report.sorting import check_paths, check_target, walked_folders
from transclip_fast.store.corrections import corrected, read_corrections
from transclip_fast.store.features import LABELLED, Features, load_features
from transclip_fast.store.graphs import load_graph
from transclip_fast.store.linear_maps import map_features
from transclip_fast.store.results import TRANSCLIP


@click.command(
    "solve",
    cls=Command,
    shown="graph_folder text_features labels class_names corrections class_cost memory device csv",
)
@click.argument("path", metavar="FEATURES", type=options.PATH)
@options.out_option
@options.graph_option
@options.search_options
@method_options
@click.option(
    "--head",
    help="Few-shot method that makes the prior: a file of `train-head`, or a method to train on "
    f"the shots: {', '.join(HEADS)}.",
)
@click.option("--seed", default=0, type=options.SEED, help="Seed of the head's training.")
@tower_options
@options.device_option
@options.csv_option
@options.sort_option
@options.json_option
@options.array_options(*options.ARRAYS)
@options.shots_option
@options.text_map_option
@options.image_map_option
@click.option(
    "--corrections",
    multiple=True,
    type=options.PATH,
    help="Table of keys and labels that a person checked, as the page of `report` saves it: known "
    "labels, over others. Several times: later ones win.",
)
@options.reject_option
@options.parameter_options
def command(
    path: str, out: str, head: str | None, sort_into: str | None, as_json: bool, **values: Any
) -> None:
    """Label all rows of FEATURES jointly.

    FEATURES is a feature folder, a file (.npz, .pt, .safetensors) with image_features (N, d) and
    text_features (K, d), or a folder of few-shot caches. --out receives predictions.parquet,
    mixture.safetensors and run.json. Run the same command again after a crash: it resumes and gives
    bit-identical results. Few-shot, priors, other methods and parameters: --help-all.

    \b
    Examples:
      transclip-fast solve features.npz --out result
      transclip-fast solve images.npy --text-features text.npy --out result
      transclip-fast solve features --corrections corrections.csv --out result2
    \f
    \b
    More examples:
      transclip-fast solve images.npy --text-features text.npy --class-names names.txt --out result
      transclip-fast solve features.npz --support-features shots.npy --support-labels y.npy \\
          --gamma 0.02 --out result
      transclip-fast solve features.npz --known-labels checked.npy --out result
      transclip-fast solve caches/dtd --shots 16 --text-features text.pt --out result
      transclip-fast solve features.npz --head taskres --out result
      transclip-fast solve features --head coop.safetensors --out result
      transclip-fast solve features.npz --method stata --set alpha=2 --out result
      torchrun --nproc-per-node 4 -m transclip_fast.cli solve features --graph graph --out result

    A file may also hold labels (N,), class_names (K,), keys (N,), support_features (M, d),
    support_labels (M,), validation_features (V, d), validation_labels (V,), known_labels (N,), and
    of another method one of prior (N, K), prior_logits (N, K) and prototypes (K, d). Caches are
    test_f.pt, keys_16shots.pt, ... Labels are positions in the list of classes, class names, or
    one-hot. A sparse prior is a scipy CSR file, or prior_indices (N, m) and prior_values (N, m)
    with the largest classes of each row.

    Methods other than transclip have no mixture, and keep only the graph after a crash.

    Started by torchrun, processes on one or more machines that see the same folders share the rows;
    labels have the same bits for any number of them, also when another number resumes after a
    crash. Without --graph, they share the search for it, too.
    """
    if sort_into is not None:
        check_paths(path)
        check_target(sort_into, [path, out, *walked_folders(path)])
    with joined(together=True) as ranks:
        run = _solve(path, out, head, ranks, quiet=as_json, **values)
    if not ranks.leads:
        return
    if run["method"] != TRANSCLIP:
        lines = [describe_result(run, out)]
    else:
        lines = [
            describe_solution(run, out, planned=True),
            f"to look at it: {command_line('report', out)}",
        ]
    with session.collected_warnings({}) as messages:
        found, sorted_lines = sorted_into(sort_into, out, path)
    summary = {**run, **found, "warnings": [*dict.fromkeys([*run["warnings"], *messages])]}
    session.print_summary(summary, "\n".join([*lines, *sorted_lines]), as_json)


def _solve(
    path: str, out: str, head: str | None, ranks: Ranks, *, quiet: bool, **values: Any
) -> dict[str, Any]:
    """Read what the options name, and solve; run.json."""
    stages, shared = session.Stages(), ranks is not ALONE
    if head is not None and shared:
        raise InputError("--head: is trained and applied in one process; run `solve` without ranks")
    if values["method"] != TRANSCLIP and shared:
        name = values["method"]
        raise InputError(f"--method: {name} is one process; run `solve` without ranks")
    model = options.model_of(values)
    stored = None if head is None else read_choice(head)
    if values["method"] == TRANSCLIP:
        _refuse_unused(head, stored)
    refuse_search(values)
    with stages.time("load"), session.collected_warnings({}, shown=ranks.leads) as noted:
        local = stored is not None and stored.head.wants_patches
        arrays = {name: values[name] for name in options.ARRAYS}
        features = load_features(path, arrays, shots=values["shots"], local=local)
        map_features(features, text=values["text_map"], image=values["image_map"])
        features = corrected_features(features, values["corrections"])
        method = method_of(values, features)
        graph: NeighborGraph | GraphSearch
        needed = neighbors_of(method or model, features)
        if values["graph_folder"] and not needed:
            raise InputError(f"--graph: {values['method']} uses no graph; leave it out")
        if values["graph_folder"]:
            graph = load_graph(values["graph_folder"], features.sha256(), mapped=shared)
        else:
            graph = search_of(values, needed)
    features.origins["graph"] = values["graph_folder"] or "graph"
    again = [*options.given_options(out, {*values, "head"})]
    output = Output(values["reject"], values["csv"], again, noted)
    solving = Solving(features, out, stages, output)
    if method is not None:
        return solve_with_method(solving, method, graph)
    make_head = None
    if head is not None:
        features.origins[head] = head  # if it is a file
        make_head = partial(apply_head, head, stored, values, model, stages)
    return solve_features(solving, model, graph, make_head=make_head, quiet=quiet)


def _refuse_unused(head: str | None, stored: StoredHead | None) -> None:
    """Raise InputError for options that the head, in the file or to be fitted, has no use for."""
    if head is None:
        options.refuse_unused(("seed", *TOWER), "is of a --head, and there is none")
    if stored is None or not stored.head.runs_tower:
        options.refuse_unused(TOWER, f"the head {head} runs no text tower")
    if stored is not None:
        options.refuse_unused(("seed", *LABELLED), f"the head in {head} is trained already")
        options.refuse_unused(("image_map",), f"the head in {head} was trained on rows without one")


def corrected_features(features: Features, files: Sequence[str]) -> Features:
    """Features of which the rows in files of corrections are known, later files over earlier."""
    for file in files:
        n_rows = len(features.get("image_features"))
        found = read_corrections(file, features.keys, features.class_names, n_rows)
        known = features.get("known_labels")
        if known is None:
            known = np.full(n_rows, -1)
        n_classes = features.n_classes  # the solve, which always knows it, checks them again
        known = as_labels(known, "known_labels", rows=n_rows, n_classes=n_classes, lowest=-1)
        known = corrected(known.numpy(), found)
        features = features.with_arrays({**features.arrays, "known_labels": known})
        features.origins["known_labels"], features.corrected = file, True
    return features
