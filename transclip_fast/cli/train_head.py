"""`transclip-fast train-head`: a few-shot method on features, to a file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import click

from transclip_fast.cli import options, session
from transclip_fast.cli.command import Command
from transclip_fast.cli.session import counted
from transclip_fast.cli.towers import TOWER, Prompter, encoder_of, tower_options
from transclip_fast.cli.truth import true_labels
from transclip_fast.errors import InputError
from transclip_fast.heads import HEADS, LEARNERS, SETTINGS, ensemble, fit_head, method_named
from transclip_fast.heads.files import StoredHead, check_head_file, save_head
from transclip_fast.heads.prompting import POSITIONS, WARM_UP_EPOCHS
from transclip_fast.heads.task import as_fit_arguments
from transclip_fast.progress_bar import progress_bar
from transclip_fast.protocols.data import load_splits
from transclip_fast.protocols.training import checkpoint_identity, draw_rows, summarise_head
from transclip_fast.store.atomic import locked, remove
from transclip_fast.store.checkpoint import FileCheckpoint, files
from transclip_fast.store.features import LABELLED
from transclip_fast.store.foreign import is_cache
from transclip_fast.version import __version__

CHECKPOINT_SECONDS = 5.0  # between two states, unless they are slow to write
CHECKPOINT = "training"  # ends the name of the checkpoint, a hidden file next to the head
ARRAYS = ("text_features", "class_names", "labels", *LABELLED)
PROMPT_OPTIONS = (
    *(*TOWER, "device", "n_ctx", "start"),
    *("class_specific", "position", "epochs", "rate"),
)
SHOWN_CLASSES = 5  # contexts whose words are printed


@click.command("train-head", cls=Command, shown="shots seed start epochs model pretrained device")
@click.argument("name")
@click.argument("path", metavar="FEATURES", type=options.PATH)
@click.option("--shots", type=options.POSITIVE, help="Rows of a class.  [default: all]")
@options.tensors_out_option
@click.option("--seed", default=0, type=options.SEED, help="Of the shots and of the training.")
@click.option(
    "--logit-scale",
    default=100.0,
    type=options.FiniteRange(0, min_open=True),
    help="CLIP's logit scale, 1 / temperature; `solve` needs the same.",
)
@tower_options
@click.option(
    "--context",
    "n_ctx",
    type=click.IntRange(1, 64),
    help="Learned vectors of a prompt, from random ones.  [default: as published: 16, cocoop has "
    "--start]",
)
@click.option("--start", help='Words to start from.  [default: none, cocoop "a photo of a"]')
@click.option("--class-specific", is_flag=True, help="Vectors of each class, instead of shared.")
@click.option(
    "--position",
    default="end",
    type=click.Choice(POSITIONS),
    help="Where the class name stands in the prompt.",
)
@click.option(
    "--epochs",
    type=options.POSITIVE,
    help="Passes over the shots.  [default: coop, prograd: 50 with one shot, 100 up to four, else "
    f"200; plot: {SETTINGS['plot'][1].epochs}, cocoop: {SETTINGS['cocoop'][1].epochs}]",
)
@click.option(
    "--rate",
    type=options.FiniteRange(0, min_open=True),
    help=f"Learning rate.  [default: coop, prograd, plot: {SETTINGS['coop'][1].rate:g}; "
    f"cocoop: {SETTINGS['cocoop'][1].rate:g}]",
)
@options.device_option
@options.json_option
@options.array_options(*ARRAYS)
def command(
    name: str, path: str, shots: int | None, out: str, as_json: bool, **values: Any
) -> None:
    """Train the few-shot method NAME on FEATURES and write a file for `solve --head`.

    FEATURES is a folder of the feature folders train/, test/ and perhaps val/, or a file with
    support_features, support_labels and perhaps validation rows; see `solve`. NAME is coop,
    prograd, cocoop or plot, which learn prompts through the text tower of the model that encoded
    FEATURES, or a method on features alone, see `solve --head`. Run the same command again after a
    crash: the training of prompts resumes from its last checkpoint.

    \b
    Examples:
      transclip-fast train-head coop pets --shots 16 --out coop.safetensors
      transclip-fast solve pets/test --head coop.safetensors --out result
    \f
    \b
    More examples:
      transclip-fast train-head prograd features.npz --shots 4 --start "a photo of a" \\
          --model ViT-B-32 --pretrained openai --out prograd.safetensors

    Plot transports to the patches of images, as `encode --local-features` writes them, or
    local_features (N, L, d), support_local_features and validation_local_features of a file;
    without them it warns and takes the mean of its prompts.
    """
    method = method_named(name)
    check_head_file(out)
    if name in HEADS:
        options.refuse_unused(PROMPT_OPTIONS, f"head {name} learns no prompts")
    if values["epochs"] == WARM_UP_EPOCHS:
        options.refuse_unused(("rate",), "the only epoch is the warm-up, which has its own rate")
    stages = session.Stages()
    with stages.time("load"), session.collected_warnings({}) as noted:
        arrays = {array: values[array] for array in ARRAYS}
        only = shots if is_cache(path) else None
        features = load_splits(path, arrays, shots=only, local=method.takes_patches)
    texts = features.get("text_features")
    about = partial(session.errors_about, features.origins, features.path)
    with session.collected_warnings(features.origins) as messages, locked(out):
        with about():
            if texts is None:
                raise InputError(f"head {name} needs text_features")
            text = ensemble(texts)
            truth = true_labels(features, len(text))
            rows = draw_rows(features, text, shots, values["seed"])
        prompting, encoder = None, features.encoder
        if name in LEARNERS:
            with stages.time("model"):
                prompting = Prompter(values)(features, name)
            identity = checkpoint_identity(name, features, rows, prompting, values)
            checkpoint = FileCheckpoint(out, CHECKPOINT, identity, CHECKPOINT_SECONDS)
            prompting = replace(prompting, checkpoint=checkpoint)
            encoder = encoder_of(prompting.tower.backbone)
        last: dict[str, str] = {}
        with stages.time("train"), progress_bar(f"train {name}", "steps") as show, about():

            def step(done: int, steps: int, **figures: str) -> None:
                last.update(figures)
                show(done, steps, **figures)

            head = fit_head(
                name,
                texts,
                **as_fit_arguments(rows),
                logit_scale=values["logit_scale"],
                seed=values["seed"],
                progress=step,
                prompting=prompting,
            )
        with about():
            found = summarise_head(head, features, rows, text, truth)
        training = {"shots": shots, "seed": values["seed"], "version": __version__}
        save_head(out, StoredHead(head, name, features.class_names, encoder, training))
        remove(*files(out, CHECKPOINT))
    run = {
        "kind": "train-head",
        "name": name,
        **found,
        "loss": float(last["loss"]) if "loss" in last else None,
        "training": training,
        "seconds": stages.seconds,
        "versions": session.versions(),
        "warnings": [*noted, *messages],
    }
    session.print_summary(run, _text(run, out), as_json)


def _text(run: Mapping[str, Any], out: str) -> str:
    """The summary for a reader."""
    loss = "" if run["loss"] is None else f", loss {run['loss']:.4f} at the end"
    lines = [
        f"{run['name']}: trained on {run['n_shots']:,} shots of {run['n_classes']:,} classes in "
        f"{run['seconds']['train']:.1f} s{loss}"
    ]
    if run["parameters"]:
        lines.append(", ".join(f"{name} {value:g}" for name, value in run["parameters"].items()))
    words = run["nearest_words"] or {}
    for of, near in list(words.items())[:SHOWN_CLASSES]:
        lines.append(f"words nearest to the context of {of}: {' '.join(near)}")
    if len(words) > SHOWN_CLASSES:
        lines.append(f"... and of {len(words) - SHOWN_CLASSES:,} more classes")
    if run["validation_accuracy"] is not None:
        lines.append(f"accuracy on the validation rows {run['validation_accuracy']:.2f} %")
    if run["accuracy"] is not None:
        lines.append(
            f"accuracy on {counted(run['n_labelled'], 'image')} {run['zero_shot_accuracy']:.2f} % "
            f"zero-shot -> {run['accuracy']:.2f} %"
        )
    lines.append(f"written to {out}; TransCLIP goes on top with `solve --head {shlex.quote(out)}`")
    return "\n".join(lines)
