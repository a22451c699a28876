"""How far `calibrated_confidences_` can be believed, beside z of the label.

On golden data (`TRANSCLIP_GOLDEN`), by the rules and from the pools of
`bench.accuracy.wild_scenarios`. The expected calibration error is the mean distance between
confidence and accuracy in 15 bins of equal width; the area under the ROC curve is the chance that a
right label has a higher confidence than a wrong one. The constants are chosen on half of the pools,
and the table is of the other half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.accuracy.outliers import area_under_roc
from bench.accuracy.wild import problems
from bench.accuracy.wild_problems import Pool
from bench.accuracy.wild_scenarios import FEW, FINE, SCENARIOS
from bench.common import command_line, print_table, record
from bench.wild_tables import CALIBRATION_HEAD, calibration_line
from transclip_fast import TransCLIP
from transclip_fast.solver import confidence, loop

BINS = 15
# How the names of the pools begin; the last has the images of these sets, too.
CHOOSING = ("whurs19 rn50", "dtd", "oxford_pets", "all sets")
NAMES = (
    *((FEW, x) for x in ("all", "half the classes", "2 to 5 classes, all rows", "long tail")),
    *((FEW, x) for x in ("Dirichlet sizes", "64 rows at random")),
    *((FINE, x) for x in ("each set, its own list", "one set in 184 classes", "5 of 184 classes")),
)
TEMPERATURES, SMOOTHINGS = (2.0, 3.0, 4.0, 5.0), (1e-4, 1e-3, 1e-2)
Figures = dict[str, float]


def calibration_error(confidences: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error in percent."""
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    sizes = np.bincount(bins, minlength=BINS)
    gaps = np.bincount(bins, confidences - right, minlength=BINS)  # times the size of each bin
    return 100 * float(np.abs(gaps).sum() / sizes.sum())


@contextmanager
def every_variant() -> Iterator[list[dict[str, np.ndarray]]]:
    """Collect the confidences of each solve of a fit, with every pair of constants."""
    found: list[dict[str, np.ndarray]] = []
    once = confidence.calibrated_confidences

    def all_of_them(*arguments: Any) -> torch.Tensor:
        variants = {}
        for temperature, smoothing in product(TEMPERATURES, SMOOTHINGS):
            with mock.patch.multiple(confidence, TEMPERATURE=temperature, SMOOTHING=smoothing):
                variants[f"T {temperature:g}, eps {smoothing:g}"] = once(*arguments).numpy()
        default = once(*arguments)
        found.append({"calibrated": default.numpy(), **variants})
        return default

    with mock.patch.object(loop, "calibrated_confidences", all_of_them):
        yield found


def measure(pool: Pool) -> dict[str, Figures]:
    """Return the figures of z, of the default and of each pair of constants."""
    model = TransCLIP(device="cpu", logit_scale=pool.logit_scale)
    with every_variant() as found:
        model.fit(pool.features, text_features=pool.prototypes)
    z = model.label_distributions_.max(1)
    z = np.asarray(z.toarray() if hasattr(z, "toarray") else z).ravel()
    right = model.transduction_ == pool.labels
    # Of two solves, the one whose labels were kept.
    kept = next(x for x in found if np.array_equal(x["calibrated"], model.calibrated_confidences_))
    return {name: figures(x, right) for name, x in {"z": z, **kept}.items()}


def figures(confidences: np.ndarray, right: np.ndarray) -> Figures:
    """Return error, area (0.5 where all labels are right, or wrong) and overconfidence."""
    mixed = 0 < right.sum() < len(right)
    return {
        "error": round(calibration_error(confidences, right), 3),
        "area": round(area_under_roc(confidences, right), 4) if mixed else 0.5,
        "over": round(100 * float(confidences.mean() - right.mean()), 3),
    }


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measure, record and print; the exit code."""
    command_line(__spec__, __doc__).parse_args(arguments)
    errors: dict[str, list[Any]] = {}  # by variant a mean of each scenario
    lines = []
    for family, scenario in NAMES:
        choosing: list[dict[str, Figures]] = []
        held_out: list[dict[str, Figures]] = []
        for pool in problems(scenario, SCENARIOS[family][scenario]):
            half = choosing if pool.name.startswith(CHOOSING) else held_out
            half.append(measure(pool))
        for name in choosing[0] if choosing else ():
            errors.setdefault(name, []).append(np.mean([x[name]["error"] for x in choosing]))
        held_out = [{name: x[name] for name in ("z", "calibrated")} for x in held_out]
        row = {"family": family, "scenario": scenario, "draws": held_out}
        record("calibration", row)
        if held_out:  # all pools of some scenarios choose
            lines.append([scenario, *calibration_line(held_out)])
        say(scenario)
    means = {name: round(float(np.mean(x)), 3) for name, x in errors.items()}
    record("calibration", {"family": "choice", "scenario": "constants", "errors": means})
    say(str(means))
    print_table(CALIBRATION_HEAD, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
