"""`transclip-fast train-map`: a linear map of texts, trained on captions and swapped ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import click

from transclip_fast.cli import options, session
from transclip_fast.cli.command import Command
from transclip_fast.cli.pairs import LoadedPairs, load_pairs, pair_options, text_lines
from transclip_fast.cli.session import counted
from transclip_fast.encode.pairs import Pairs
from transclip_fast.errors import InputError
from transclip_fast.heads.swapped_captions import ATTRIBUTES, attribute_swapper
from transclip_fast.heads.text_map import MapTraining, TextMap, train_text_map
from transclip_fast.progress_bar import progress_bar
from transclip_fast.store.atomic import locked
from transclip_fast.store.linear_maps import check_map_file, save_map
from transclip_fast.version import __version__

SHOWN_CAPTIONS = 3  # of those without a false one
DEFAULTS = MapTraining()


@dataclass
class _Negatives:
    """Takes a file's false captions, makes those that it lacks, and counts both."""

    attributes: Iterable[str]
    given: int = 0
    swapped: int = 0
    without: list[tuple[int, str]] = field(default_factory=list)  # row and caption

    def complete(self, pairs: Pairs) -> Pairs:
        """The same pairs with the false captions that can be made."""
        swap, found = attribute_swapper(self.attributes), list[str | None]()
        for row, (caption, negative) in enumerate(
            zip(pairs.captions, pairs.negatives, strict=True)
        ):
            if negative == caption:
                raise InputError(
                    f"{pairs.path}: row {row}: its negative is its caption; correct it"
                )
            made = swap(caption) if negative is None else None
            self.given += negative is not None
            self.swapped += made is not None
            if negative is made is None:
                self.without.append((row, caption))
            found.append(negative if made is None else made)
        if len(self.without) == len(pairs):
            raise InputError(
                f"{pairs.path}: no row has a negative, nor two attributes to swap; list those of "
                "its captions in a file for --attributes"
            )
        return replace(pairs, negatives=found)


@click.command(
    "train-map",
    cls=Command,
    shown="out model pretrained precision root features attributes epochs seed device",
)
@click.argument("path", metavar="FILE", type=options.PATH)
@options.tensors_out_option
@click.option(
    "--attributes",
    type=options.PATH,
    help="Words that change places in a caption without a negative, one a line.  [default: "
    "colours, materials, sizes, ages, states]",
)
@click.option(
    "--epochs", default=DEFAULTS.epochs, type=options.POSITIVE, help="Passes over the pairs."
)
@click.option(
    "--batch-pairs", default=DEFAULTS.batch_size, type=options.POSITIVE, help="Pairs of a step."
)
@click.option(
    "--held-out",
    default=DEFAULTS.held_out,
    type=options.FiniteRange(0, 1, min_open=True, max_open=True),
    help="Share of the images whose pairs choose the epoch.",
)
@click.option("--seed", default=0, type=options.SEED, help="Of the share and of the training.")
@click.option(
    "--logit-scale",
    type=options.FiniteRange(0, min_open=True),
    help="Of the loss.  [default: the model's; of a file of features 100]",
)
@pair_options
def command(path: str, out: str, as_json: bool, **values: Any) -> None:
    """Train a linear map of texts on the captions of FILE, as LABCLIP does.

    FILE is as for `evaluate-pairs`; rows without a negative get their caption with two attributes
    swapped, and rows with fewer than two train without one. `solve` and `evaluate-pairs` take the
    map as --text-map.

    \b
    Example:
      transclip-fast train-map captions.csv --model ViT-B-32 --pretrained openai \\
          --out map.safetensors
    \f

    The matrix starts at the identity and is trained on features, which are encoded once. The epoch
    with the best accuracy on the images held out is kept, right against false caption; where none
    is better than the identity, that is written.
    """
    stages = session.Stages()
    check_map_file(out)
    with session.collected_warnings({}) as warnings, locked(out):
        words = ATTRIBUTES if values["attributes"] is None else text_lines(values["attributes"])
        negatives = _Negatives(words)
        with stages.time("load"):
            loaded = load_pairs(path, values, negatives.complete)
        training = MapTraining(
            epochs=values["epochs"],
            batch_size=values["batch_pairs"],
            logit_scale=values["logit_scale"] or loaded.logit_scale or DEFAULTS.logit_scale,
            held_out=values["held_out"],
            seed=values["seed"],
        )
        with (
            stages.time("train"),
            progress_bar("train-map", "epochs") as show,
            session.errors_about({"pairs": path}, path),
        ):
            found = train_text_map(loaded.features, training, show)
        run = _figures(found, training)
        save_map(out, found.weight, {"encoder": loaded.encoder, "version": __version__, **run})
    run |= {
        "n_given": negatives.given,
        "n_swapped": negatives.swapped,
        "without_negative": [[row, caption] for row, caption in negatives.without],
        **loaded.summary(),
        "warnings": warnings,
        "seconds": stages.seconds,
        "versions": session.versions(),
    }
    session.print_summary(run, "\n".join(_text(found, training, negatives, loaded, out)), as_json)


def _figures(found: TextMap, training: MapTraining) -> dict[str, Any]:
    """How a map was trained, and how it did on the pairs held out, as its file says it."""
    return {
        "epoch": found.epoch,
        "accuracy": found.accuracies[found.epoch],
        "identity_accuracy": found.accuracies[0],
        "loss": found.losses[found.epoch],
        "identity_loss": found.losses[0],
        "n_trained": found.n_trained,
        "n_held_out": found.n_held_out,
        "training": asdict(training),
    }


def _text(
    found: TextMap, training: MapTraining, negatives: _Negatives, loaded: LoadedPairs, out: str
) -> list[str]:
    """The summary for a reader."""
    lines = []
    if negatives.given or negatives.swapped:
        lines.append(
            f"{counted(negatives.given, 'false caption')} of the file, "
            f"{negatives.swapped:,} made by swapping attributes"
        )
    if negatives.without:
        lines.append(f"{counted(len(negatives.without), 'caption')} without one, such as")
        lines += [f"  row {row}: {text}" for row, text in negatives.without[:SHOWN_CAPTIONS]]
    before, after = found.accuracies[0], found.accuracies[found.epoch]
    kept = (
        f"after epoch {found.epoch} of {training.epochs}"
        if found.epoch
        else "no epoch was better: the map is the identity"
    )
    return [
        *lines,
        *loaded.failure_lines(),
        f"trained on {counted(found.n_trained, 'pair')}; {found.n_held_out:,} held out",
        f"right against false caption {before:.2f} % -> {after:.2f} %, {kept}",
        f"written to {out}; `solve` and `evaluate-pairs` take it as --text-map",
    ]
