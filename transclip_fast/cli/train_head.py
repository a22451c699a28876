"""`transclip-fast train-head`: a few-shot method on stored features, to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import click
import numpy as np
import torch

from transclip_fast.cli import session
from transclip_fast.cli.head import LABELLED, SUFFIX
from transclip_fast.cli.options import SectionedCommand, array_options, device_option, json_option
from transclip_fast.cli.towers import (
    encoder_of,
    load_tower,
    prompt_options,
    settings_of,
    tower_options,
)
from transclip_fast.data.checks import as_labels, as_unit_rows
from transclip_fast.errors import InputError
from transclip_fast.heads import (
    HEADS,
    LEARNERS,
    WITH_PATCHES,
    Head,
    check_head,
    ensemble,
    fit_head,
)
from transclip_fast.heads.files import StoredHead, check_writable, save_head
from transclip_fast.heads.prompts import Prompting
from transclip_fast.heads.prompts.cocoop import ConditionalHead
from transclip_fast.heads.prompts.coop import PromptHead
from transclip_fast.heads.prompts.plot import TransportHead
from transclip_fast.heads.task import Labelled, PrototypeHead, as_fit_arguments, inputs_for
from transclip_fast.metrics import accuracy
from transclip_fast.progress_bar import progress_bar
from transclip_fast.protocols.data import (
    VALIDATION_SHOTS,
    draw,
    labelled_pools,
    patched_rows,
    shortage,
    stored_splits,
)
from transclip_fast.store.arrays import array_sha256
from transclip_fast.store.atomic import locked
from transclip_fast.store.checkpoint import TensorCheckpoint, files
from transclip_fast.store.features import Features
from transclip_fast.store.foreign import is_cache
from transclip_fast.version import __version__

CHECKPOINT_SECONDS = 5.0
TRAINING = "training"  # what its state is kept under, beside the file to write
ARRAYS = ("text_features", "class_names", "labels", *LABELLED)
OF_PROMPTS = ("model", "pretrained", "precision", "n_ctx", "start", "class_specific", "epochs")
SHOWN_CLASSES = 5  # whose contexts are shown


@click.command("train-head", cls=SectionedCommand)
@click.argument("name")
@click.argument("features", type=click.Path())
@click.option("--shots", type=click.IntRange(min=1), help="Rows of a class.  [default: all]")
@click.option("--out", required=True, type=click.Path(), help="The .safetensors file to write.")
@click.option("--seed", default=0, show_default=True, help="Of the shots and of the training.")
@click.option(
    "--logit-scale", default=100.0, show_default=True, help="Temperature; `solve` needs the same."
)
@tower_options
@prompt_options
@device_option
@json_option
@partial(array_options, names=ARRAYS)
def command(
    name: str, features: str, shots: int | None, out: str, as_json: bool, **options: Any
) -> None:
    """Train the few-shot method NAME on FEATURES and write a file for `solve --head`.

    FEATURES is a folder of the feature folders train/, test/ and perhaps val/, or a file with
    support_features, support_labels and perhaps validation rows; see `solve`. NAME is coop,
    prograd, cocoop or plot, which learn prompts through the text tower of the model that encoded
    FEATURES, or a method on features alone, see `solve --head`. Plot transports to the
    patches of images, as `encode --local-features` writes them, or local_features (N, L, d),
    support_local_features and validation_local_features of a file; without them it says so, and
    takes the mean of its prompts. A training of prompts that was killed goes on when the same
    command is given again.

    \b
    Examples:
      transclip-fast train-head coop pets --shots 16 --out coop.safetensors
      transclip-fast train-head prograd features.npz --shots 4 --start "a photo of a" \\
          --model ViT-B-32 --pretrained openai --out prograd.safetensors
      transclip-fast solve pets/test --head coop.safetensors --out result
    """
    check_head(name)
    if not out.endswith(SUFFIX):
        raise InputError(f"{out}: name a file that ends in {SUFFIX}")
    for option in OF_PROMPTS if name in HEADS else ():
        if options[option]:
            raise InputError(f"head {name} learns no prompts; leave {option} out")
    stages = session.Stages()
    with stages.time("load"):
        given = {array: options[array] for array in ARRAYS}
        only = shots if is_cache(features) else None
        stored = stored_splits(features, given, shots=only, local=name in WITH_PATCHES)
    about = partial(session.errors_about, stored.origins, stored.path)
    with session.collected_warnings(stored.origins) as warnings, locked(out):
        check_writable(out)
        with about():
            text = _text_of(stored, name)
            truth = _truth(stored, len(text))
            pools = _drawn(stored, text, shots, options["seed"], warnings)
        prompting = None
        if name in LEARNERS:
            with stages.time("model"):
                prompting = _prompting(name, stored, options)
            identity = _identity(name, stored, pools, prompting, options)
            checkpoint = TensorCheckpoint(out, TRAINING, identity, CHECKPOINT_SECONDS)
            prompting = replace(prompting, checkpoint=checkpoint)
        with stages.time("train"), progress_bar(f"train {name}", "steps") as show, about():
            last: dict[str, str] = {}

            def step(done: int, steps: int, **figures: str) -> None:
                last.update(figures)
                show(done, steps, **figures)

            head = _fitted(name, stored, pools, prompting, options, step)
        with about():
            run = _summary(name, head, stored, pools, text, truth)
        training = {"shots": shots, "seed": options["seed"], "version": __version__}
        encoder = stored.encoder if prompting is None else encoder_of(prompting.tower.backbone)
        save_head(out, StoredHead(head, name, stored.class_names, encoder, training))
        files(out, TRAINING, TensorCheckpoint.suffix)[0].unlink(missing_ok=True)
        run["loss"] = float(last["loss"]) if "loss" in last else None
        run |= {"training": training, "seconds": stages.seconds, "versions": session.versions()}
        run["warnings"] = warnings
    session.print_summary(run, _text(run, features, out), as_json)


def _text_of(stored: Features, name: str) -> torch.Tensor:
    """Zero-shot's prototypes (K, d)."""
    texts = stored.get("text_features")
    if texts is None:
        raise InputError(f"head {name} needs text_features")
    return ensemble(texts)


def _truth(stored: Features, n_classes: int) -> np.ndarray | None:
    """The checked labels of the queries, where there are any."""
    labels, rows = stored.get("labels"), len(stored.get("image_features"))
    if labels is None:
        return None
    return as_labels(labels, "labels", rows=rows, n_classes=n_classes).cpu().numpy()


def _drawn(
    stored: Features, text: torch.Tensor, shots: int | None, seed: int, warnings: list[str]
) -> dict[str, Labelled]:
    """The pools, or what is drawn of them: for validation at most 4 rows a class."""
    n_classes, d = text.shape
    pools = labelled_pools(stored, d, n_classes)
    if "support" not in pools:
        raise InputError(
            "has no shots: give a folder with train/, or support_features and support_labels"
        )
    if shots is None:
        return {pool: rows.rows(slice(None)) for pool, rows in pools.items()}
    short = shortage(pools["support"], n_classes, shots)
    if short is not None:
        session.warn(warnings, f"{stored.path}: {short}")
    held_out = min(shots, VALIDATION_SHOTS)
    sizes = {"support": shots, "validation": held_out}
    return {pool: draw(rows, n_classes, sizes[pool], seed) for pool, rows in pools.items()}


def _prompting(name: str, stored: Features, options: Mapping[str, Any]) -> Prompting:
    """The text tower of the features, and how prompts are learned through it."""
    context, schedule = settings_of(name, options)
    if stored.class_names is None:
        raise InputError(
            f"{stored.path}: has no class_names to make prompts of; give --class-names"
        )
    named = (options[option] for option in ("device", "model", "pretrained", "precision"))
    tower = load_tower(stored, *named)
    return Prompting(tower, stored.class_names, context, schedule)


def _identity(
    name: str,
    stored: Features,
    pools: Mapping[str, Labelled],
    prompting: Prompting,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """All that a training depends on."""
    rows = {
        f"{pool}_{part}": array_sha256(getattr(labelled, part))
        for pool, labelled in pools.items()
        for part in ("features", "labels")
    }
    return {
        "name": name,
        "context": asdict(prompting.context),
        "schedule": asdict(prompting.schedule),
        "tower": prompting.tower.identity,
        "class_names": list(prompting.class_names),
        "text": stored.inputs_sha256()["text_features"],
        **rows,
        **{option: options[option] for option in ("seed", "logit_scale")},
        "device": prompting.tower.device.type,
        "version": __version__,
    }


def _fitted(
    name: str,
    stored: Features,
    pools: Mapping[str, Labelled],
    prompting: Prompting | None,
    options: Mapping[str, Any],
    show: Any,
) -> Head:
    arrays: dict[str, Any] = {}
    for pool, rows in pools.items():
        arrays |= as_fit_arguments(rows, pool)
    return fit_head(
        name,
        stored.get("text_features"),
        **arrays,
        logit_scale=options["logit_scale"],
        seed=options["seed"],
        progress=show,
        prompting=prompting,
    )


def _summary(
    name: str,
    head: Head,
    stored: Features,
    pools: Mapping[str, Labelled],
    text: torch.Tensor,
    truth: np.ndarray | None,
) -> dict[str, Any]:
    """What was learned, and how well it does on the queries."""
    found: dict[str, float | None] = {"zero_shot_accuracy": None, "accuracy": None}
    # To ask a text tower for every query takes long, and `solve` does it anyway.
    if truth is not None and not isinstance(head, ConditionalHead):
        rows = as_unit_rows(stored.get("image_features"), "image_features", columns=text.shape[1])
        seen = inputs_for(head, rows, patched_rows(rows, stored))
        zero_shot = PrototypeHead(text=text, logit_scale=head.logit_scale)
        found = {
            "zero_shot_accuracy": accuracy(zero_shot.predict(rows).numpy(), truth),
            "accuracy": accuracy(head.predict(seen).numpy(), truth),
        }
    held_out = pools.get("validation")
    return {
        "kind": "train-head",
        "name": name,
        "n_classes": len(head.text),
        "n_shots": len(pools["support"]),
        "n_queries": len(stored.get("image_features")),
        **found,
        "validation_accuracy": held_out
        and accuracy(head.predict(held_out.features).numpy(), held_out.labels.numpy()),
        "parameters": head.parameters,
        "nearest_words": _words(head, stored.class_names),
    }


def _words(head: Head, names: list[str] | None) -> dict[str, list[str]] | None:
    """Words nearest to the context of each class, of "all", or of each of several prompts."""
    if not isinstance(head, PromptHead | ConditionalHead | TransportHead):
        return None
    n_ctx = int(head.parameters["n_ctx"])
    groups = [head.words[start : start + n_ctx] for start in range(0, len(head.words), n_ctx)]
    of = ["all"]
    if isinstance(head, TransportHead):
        of = [f"prompt {number}" for number in range(1, len(groups) + 1)]
    elif isinstance(head, PromptHead) and head.context.ndim == 3:
        of = names or []
    return dict(zip(of, groups, strict=True))


def _text(run: Mapping[str, Any], features: str, out: str) -> str:
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
            f"accuracy on {run['n_queries']:,} queries {run['zero_shot_accuracy']:.2f} % zero-shot "
            f"-> {run['accuracy']:.2f} %"
        )
    lines.append(f"written to {out}; TransCLIP goes on top with `solve --head {out}`")
    return "\n".join(lines)
