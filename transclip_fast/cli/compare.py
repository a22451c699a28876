"""`transclip-fast compare`: every method on the same rows and graph, in one table."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import click

from transclip_fast.cli import RESUMES, options, session
from transclip_fast.cli.command import Command
from transclip_fast.cli.comparison import Comparison
from transclip_fast.cli.comparison_table import SUFFIXES, as_text, check_place, write_table
from transclip_fast.cli.graph import leftovers, refuse_search
from transclip_fast.cli.method import METHOD_ARRAYS, NAMES, anchors_option, checked_arrays
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.heads.task import as_fit_arguments
from transclip_fast.protocols.data import draw_shots, labelled_pools, load_splits
from transclip_fast.store.atomic import beside, locked, remove
from transclip_fast.store.features import LABELLED, Features
from transclip_fast.store.foreign import is_cache
from transclip_fast.store.linear_maps import map_features

ARRAYS = (*METHOD_ARRAYS, "labels", "class_names")


@click.command(
    "compare", cls=Command, shown="methods out shots graph_folder text_features labels as_json"
)
@click.argument("path", metavar="FEATURES", type=options.PATH)
@click.option(
    "--methods",
    metavar="NAME,...",
    help=f"Some of {', '.join(NAMES)}.  [default: all that FEATURES allow]",
)
@click.option(
    "--out",
    type=options.PATH,
    help=f"File of the table, {', '.join(SUFFIXES)}. Methods done earlier are not run again.",
)
@click.option(
    "--shots", type=click.IntRange(min=0), help="Labelled rows drawn of a class.  [default: all]"
)
@click.option("--seed", default=0, type=options.SEED, help="Seed of the draw of shots.")
@anchors_option
@options.graph_option
@options.search_options
@options.device_option
@options.json_option
@options.array_options(*ARRAYS)
@options.text_map_option
@options.image_map_option
@options.parameter_option("logit_scale")
@options.parameter_option("gamma")
@options.parameter_option("memory")
def command(path: str, methods: str | None, out: str | None, as_json: bool, **values: Any) -> None:
    """Label FEATURES with every method, on the same rows and graph, and show one table.

    FEATURES are those of `solve`, or a folder of the feature folders test/, train/ and val/. With
    --out, run the same command again after a crash, or with other methods: those that are done are
    kept, and in the table, too.

    Columns: text is what classes were learned from; changed, the labels that differ from
    zero-shot's; time, of all runs, without the graph; settings chosen on the validation rows, and
    in how many runs; assumes, whether classes must be equally frequent.

    \b
    Examples:
      transclip-fast compare features.npz --out table.md
      transclip-fast compare pets --shots 4 --methods transclip,laplacianshot
    \f
    Settings left open are chosen on the validation rows, over the published grids. Methods that
    learn from shots take the texts as shots where there are none; --anchors changes that for those
    that can do otherwise. With many rows and classes name fast methods: tim-adm takes 150 passes
    over the features, alpha-tim and tim-gd 1,000, and validation rows multiply all passes by the
    runs.
    """
    names = _names(methods)
    if out is not None:
        check_place(out)
    refuse_search(values)
    TransCLIP(**{k: values[k] for k in ("logit_scale", "gamma", "memory")}).check()
    stages, shots = session.Stages(), values["shots"]
    if not shots or is_cache(path):
        options.refuse_unused(("seed",), "no shots are drawn")
    with stages.time("load"), session.collected_warnings({}) as noted:
        arrays = {array: values[array] for array in ARRAYS}
        features = load_splits(path, arrays, shots=shots if is_cache(path) else None)
        map_features(features, text=values["text_map"], image=values["image_map"])
    if values["gamma"] is not None and features.get("support_features") is None:
        raise InputError("gamma: is the weight of the support, and there is none; leave it out")
    origins = features.origins | {"X": features.origins["image_features"], str(out): str(out)}
    with (
        session.collected_warnings(origins) as messages,
        nullcontext() if out is None else locked(out),
        session.errors_about(origins, features.path),
    ):
        if out is not None:
            click.get_current_context().meta[RESUMES] = True
        if shots is not None and not is_cache(path):
            features = drawn(features, shots, values["seed"], messages)
        run = Comparison(features, values, out, stages)
        summary = run.compare(names, named=methods is not None, warnings=messages)
        summary["warnings"] = [*noted, *messages]
        if out is not None:
            write_table(out, summary)
            remove(*leftovers(beside(out, "graph")))
    text = as_text(summary)
    session.print_summary(summary, text if out is None else f"{text}\nwritten to {out}", as_json)


def _names(methods: str | None) -> list[str]:
    """The methods of a list with commas, each once; all without one."""
    if methods is None:
        return list(NAMES)
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in NAMES:
            raise InputError(f"method {name!r} is not known; choose of {', '.join(NAMES)}")
    return list(dict.fromkeys(names))


def drawn(features: Features, shots: int, seed: int, warnings: list[str]) -> Features:
    """Features with so many of their labelled rows of each class; 0 for none of them."""
    if features.get("support_features") is None:
        raise InputError("shots: there are no support_features to draw them from")
    kept = {name: array for name, array in features.arrays.items() if name not in LABELLED}
    if not shots:
        return features.with_arrays(kept)
    n_classes = checked_arrays(features).n_classes
    pools = labelled_pools(features, features.dim, n_classes)
    if (shortage := pools["support"].shortage(shots)) is not None:
        session.warn(warnings, f"{features.origins['support_features']}: {shortage}")
    rows = draw_shots(pools, shots, seed)
    return features.with_arrays({**kept, **as_fit_arguments(rows, patches=False)})
