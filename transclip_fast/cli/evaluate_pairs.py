"""`transclip-fast evaluate-pairs`: images between their caption and a false one, as ARO does."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import click

from transclip_fast.cli import options, session
from transclip_fast.cli.command import Command
from transclip_fast.cli.pairs import LoadedPairs, load_pairs, pair_options, text_lines
from transclip_fast.cli.session import counted
from transclip_fast.data.pairs import PairFeatures
from transclip_fast.encode.pairs import Pairs
from transclip_fast.errors import InputError
from transclip_fast.protocols.pairs import PairScores, evaluate_pairs
from transclip_fast.store.linear_maps import linear_map, read_map

SHOWN_GROUPS = 5
MIN_PAIRS = {"attributes": 25}  # as published; other groups count whatever their size


@click.command(
    "evaluate-pairs",
    cls=Command,
    shown="model pretrained precision root features text_map min_pairs leave_out device",
)
@click.argument("path", metavar="FILE", type=options.PATH)
@click.option("--text-map", type=options.PATH, help="Matrix (d, d) that maps the captions first.")
@click.option(
    "--min-pairs",
    type=options.POSITIVE,
    help="Pairs of a group that counts in the mean of groups.  [default: 25 of attributes, else 1]",
)
@click.option(
    "--leave-out",
    type=options.PATH,
    help="Groups that do not count in it either, one a line, as symmetric relations.",
)
@pair_options
def command(path: str, as_json: bool, **values: Any) -> None:
    """Count the images of FILE that are closer to their caption than to a false one.

    FILE is a .json list, a .csv or a .parquet file with image, caption and negative, perhaps a box
    (bbox_x, bbox_y, bbox_w, bbox_h) and a group; ARO's files are read as published. Or it holds
    image_features, caption_features, negative_features and perhaps groups, as an .npz does.

    \b
    Example:
      transclip-fast evaluate-pairs pairs.json --model ViT-B-32 --pretrained openai
    \f

    An image is right if its cosine to the caption is larger; a tie is wrong, and is counted.
    Accuracy is the mean over pairs, and, where there are groups (relation_name, attributes or
    group), the mean over groups. ARO's figure for relations has no symmetric ones: --leave-out.
    """
    stages = session.Stages()
    with session.collected_warnings({}) as warnings:
        left_out = [] if values["leave_out"] is None else text_lines(values["leave_out"])
        with stages.time("load"):
            loaded = load_pairs(path, values, _with_negatives)
        features = _mapped(loaded, path, values["text_map"])
        minimum = values["min_pairs"] or MIN_PAIRS.get(str(loaded.grouped_by), 1)
        with stages.time("evaluate"):
            scores = evaluate_pairs(features, min_pairs=minimum, leave_out=left_out)
        if unknown := sorted({*left_out} - {*(features.groups or [])}):
            session.warn(
                warnings,
                f"{values['leave_out']}: {len(unknown):,} of {len(left_out):,} names are no group "
                f"of {path}, such as {unknown[0]!r}",
            )
    summary = {**asdict(scores), "min_pairs": minimum, **loaded.summary(), "warnings": warnings}
    summary |= {"seconds": stages.seconds, "versions": session.versions()}
    session.print_summary(summary, "\n".join([*_text(scores), *loaded.failure_lines()]), as_json)


def _with_negatives(pairs: Pairs) -> Pairs:
    """The same pairs; InputError if one has no false caption."""
    if None in pairs.negatives:
        row = pairs.negatives.index(None)
        raise InputError(f"{pairs.path}: row {row} has no negative, or false_caption; write one")
    return pairs


def _mapped(loaded: LoadedPairs, path: str, file: str | None) -> PairFeatures:
    """The features with the captions that the map in a file makes of theirs."""
    features = loaded.features
    if file is None:
        return features
    weight, bias = read_map(file, loaded.encoder)
    captions = linear_map(features.captions, weight, bias, names=(f"{path}: captions", file))
    negatives = linear_map(features.negatives, weight, bias, names=(f"{path}: negatives", file))
    if (found := captions.shape[1]) != (expected := features.images.shape[1]):
        raise InputError(f"{file}: maps to {found} columns, expected {expected}, those of images")
    return replace(features, captions=captions, negatives=negatives)


def _text(scores: PairScores) -> list[str]:
    """Scores for a reader."""
    lines = [
        f"accuracy {scores.accuracy:.2f} % of {counted(scores.n_pairs, 'pair')}, "
        f"{counted(scores.n_ties, 'tie')} among the wrong; 50 % is chance"
    ]
    if scores.per_group is None or scores.left_out is None:
        return lines
    if scores.group_accuracy is None:
        lines.append("no group counts: none has so many pairs, or all are left out")
    else:
        mean = f"mean over {counted(len(scores.per_group), 'group')} {scores.group_accuracy:.2f} %"
        pairs = sum(pairs for _, pairs in scores.left_out)
        without = f", {counted(len(scores.left_out), 'group')} ({counted(pairs, 'pair')}) left out"
        lines.append(mean + (without if scores.left_out else ""))
        lines += ["", "worst groups             pairs"]
    for name, pairs, right in scores.per_group[:SHOWN_GROUPS]:
        lines.append(f"  {name:20.20}  {pairs:7,}  {right:7.2f} %")
    return lines
