"""run.json of the commands that label rows, and the same as text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.cli import session
from transclip_fast.cli.class_outlook import (
    ZERO_SHOT,
    describe_changes,
    size_changes,
    use_of_classes,
)
from transclip_fast.cli.graph import describe
from transclip_fast.cli.options import requested
from transclip_fast.cli.session import counted
from transclip_fast.data.checks import unit_sample
from transclip_fast.data.npy_shards import StoredRows
from transclip_fast.data.texts import ensemble
from transclip_fast.estimator import TransCLIP
from transclip_fast.metrics import accuracy
from transclip_fast.ops.exchange import Exchange
from transclip_fast.report.sorting import sort_images
from transclip_fast.solver.class_cost import is_undecided
from transclip_fast.store.features import Features
from transclip_fast.store.results import FILES, TRANSCLIP

MEAN_ROWS = 8192  # added up at a time


def run_summary(
    kind: str,
    features: Features,
    labels: np.ndarray,
    zero_shot: np.ndarray,
    truth: np.ndarray | None,
    means_shape: tuple[int, ...],
) -> dict[str, Any]:
    """The part of run.json that all commands share which label rows: labels are (N,) int64."""
    return {
        "kind": kind,
        "accuracy": None if truth is None else accuracy(labels, truth),
        "zero_shot_accuracy": None if truth is None else accuracy(zero_shot, truth),
        "n_queries": len(labels),
        "n_labelled": 0 if truth is None else int((truth >= 0).sum()),
        "n_classes": means_shape[0],
        "dim": means_shape[1],
        "n_flipped": int((labels != zero_shot).sum()),
        "size_changes": size_changes(labels, zero_shot, means_shape[0]),
        "inputs_sha256": features.inputs_sha256(),
        "encoder": features.encoder,
        "maps": features.maps,
        "class_names": features.class_names,
        "versions": session.versions(),
    }


def solver_summary(model: TransCLIP) -> dict[str, Any]:
    """The part of run.json about how it was solved."""
    parameters = requested(model)
    return {
        "method": TRANSCLIP,
        "device": str(model.device_),
        "n_iter": model.n_iter_,
        "objective": model.objective_.tolist(),
        "changed": model.changed_.tolist(),
        "graph": {"n_neighbors": model.n_neighbors, **model.graph_.info},
        "backend": model.backend_,
        "truncation": model.truncation_,
        "parameters": parameters,
        "n_effective_classes": model.n_effective_classes_,
        "config": {
            **parameters,
            "kl_weight": model.kl_weight_,
            "gamma": model.gamma_,
            "class_cost": model.class_costs_ is not None,
        },
    }


def modality_gap(
    matrix: torch.Tensor | StoredRows, text_features: Any, exchange: Exchange | None = None
) -> dict[str, float | None] | None:
    """
    How far the mean image is from the mean class text, and their cosine; None without texts.

    Of the features (N, d) as unit rows and of the texts of `ensemble`; the distance is that of
    arXiv:2203.02053. A mean of zero has no cosine. Ranks that share the rows all call this.
    """
    if text_features is None:
        return None
    n_rows, dim = matrix.shape
    first = 0 if exchange is None else exchange.partition.rows.start

    def leaf(own: slice) -> tuple[torch.Tensor]:
        total = torch.zeros(dim, dtype=torch.float64)
        for ids in torch.split(torch.arange(first + own.start, first + own.stop), MEAN_ROWS):
            total += unit_sample(matrix, ids).sum(0, dtype=torch.float64).cpu()
        return (total if exchange is None else total.to(exchange.device),)

    sums = leaf(slice(0, n_rows)) if exchange is None else exchange.total(leaf, [(dim,)])
    image = sums[0].cpu() / n_rows
    text = ensemble(text_features, columns=dim).cpu().double().mean(0)
    norms = float(image.norm() * text.norm())
    return {
        "distance": round(float((image - text).norm()), 6),
        "cosine": round(float(image @ text) / norms, 6) if norms > 0 else None,
    }


def of_others(
    name: str,
    left_out: np.ndarray | None,
    labels: np.ndarray,
    zero_shot: np.ndarray,
    truth: np.ndarray | None,
) -> dict[str, Any] | None:
    """How many rows are `left_out` (N,) bool, and the accuracy of the others; None without any."""
    if left_out is None:
        return None
    others = ~left_out

    def right(found: np.ndarray) -> float | None:
        if truth is None or not (truth[others] >= 0).any():
            return None
        return accuracy(found[others], truth[others])

    return {
        f"n_{name}": int(left_out.sum()),
        "accuracy_of_others": right(labels),
        "zero_shot_accuracy_of_others": right(zero_shot),
    }


def describe_solution(run: dict[str, Any], out: str, *, planned: bool = False) -> str:
    """The run.json of a solve as text, without what its outlook, if it was `planned`, has said."""
    seconds, truncation = run["seconds"], run["truncation"]
    uses, charged = (run["n_effective_classes"], run["n_classes"]), run["config"]["class_cost"]
    by = run.get("classes_counted_by", ZERO_SHOT)  # of earlier versions without it
    few_shot = run["config"]["gamma"] is not None
    decided = is_undecided(run["parameters"]["class_cost"], *uses, few_shot=few_shot)
    lines = [
        describe_sizes(run),
        f"{counted(run['n_flipped'], 'label')} changed from zero-shot",
        *([] if planned and not decided else [use_of_classes(*uses, charged, by, decided=decided)]),
        *describe_changes(run),
    ]
    if truncation is not None:
        lines.append(
            f"sparse: {counted(truncation['candidates'], 'candidate')} a row, "
            f"{truncation['rank']} kept; mass misplaced at most {truncation['mean_bound']:.1e} "
            f"on average, {truncation['largest_bound']:.1e} in a row"
        )
    if run["config"]["gamma"] is not None:
        source = "chosen on the validation rows" if run["n_validation"] else "by default"
        if run["parameters"]["gamma"] is not None:
            source = "as set"
        lines.append(f"few-shot, gamma {run['config']['gamma']:g} {source}")
    elif run.get("n_shots"):
        lines.append(
            f"zero-shot with {counted(run['n_shots'], 'shot')}: too few of some class for few-shot"
        )
    if run["accuracy"] is not None:
        head = run.get("head")
        alone = f", {head['accuracy']:.2f} % {head['name']}" if head else ""
        lines.append(describe_accuracy(run, f"zero-shot{alone}"))
    for name, found in (("known", run["known_labels"]), ("rejected", run["rejected"])):
        if found is not None:
            lines.append(describe_others(name, found))
    built = f"{seconds['graph']:.1f} s" if "graph" in seconds else "reused"
    graph = f"{describe(run['graph'])}, {built}"
    lines += [
        f"graph {graph}, solve {seconds['solve']:.1f} s on {run['device']}",
        describe_files(out),
    ]
    return "\n".join(lines)


def describe_sizes(run: Mapping[str, Any]) -> str:
    """How many images, classes and dimensions there are, as text."""
    return (
        f"{counted(run['n_queries'], 'image')}, {counted(run['n_classes'], 'class')}, "
        f"{counted(run['dim'], 'dimension')}"
    )


def describe_accuracy(run: Mapping[str, Any], before: str = "zero-shot") -> str:
    """The accuracy of what was `before` and of the labels, as text; of how many, unless of all."""
    text = f"accuracy {run['zero_shot_accuracy']:.2f} % {before} -> {run['accuracy']:.2f} %"
    if run["n_labelled"] == run["n_queries"]:
        return text
    return f"{text}, of the {counted(run['n_labelled'], 'image')} with a true label"


def describe_files(out: str) -> str:
    """The files of a result folder, as text."""
    return f"written to {out}: {', '.join(name for name in FILES if (Path(out) / name).is_file())}"


def sorted_into(
    target: str | None, result: str | Path, features: str | Path
) -> tuple[dict[str, Any], list[str]]:
    """Sort the images of a result into a folder if there is one; say so in JSON and in text."""
    if target is None:
        return {}, []
    found = sort_images(result, features, target)
    numbers = (found.n_images - found.n_copied, "linked"), (found.n_copied, "copied")
    done = " and ".join(f"{counted(number, 'image')} {verb}" for number, verb in numbers if number)
    folders = counted(found.n_folders - bool(found.n_rejected), "class folder")
    rejected = f", the {found.n_rejected:,} rejected into rejected/" if found.n_rejected else ""
    line = f"{done} into {folders} of {os.path.join(target, '')}{rejected}"
    return {"sorted": asdict(found)}, [line]


def describe_others(name: str, found: dict[str, Any]) -> str:
    """The summary of `of_others` as text."""
    line = f"{counted(found[f'n_{name}'], 'label')} {name}"
    if found["accuracy_of_others"] is None:
        return line
    return (
        f"{line}; of the others {found['zero_shot_accuracy_of_others']:.2f} % zero-shot -> "
        f"{found['accuracy_of_others']:.2f} %"
    )
