"""The tables of `bench.accuracy.wild`, `outliers`, `calibration` and other accuracies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bench.accuracy.wild_scenarios import FAMILIES
from bench.tables import Row, newest, source, table

METHODS = {
    "published": "published method",
    "default": "default",
    "class_cost": "class cost throughout",
    "stata": "StatA",
}
WORSE = 1.0  # points below zero-shot from which on a draw counts as worse
NEARLY_RIGHT = 90.0  # percent
SHOWN = ("published", "default", "stata")  # for the families
TEXT = (
    "Accuracy of zero-shot in percent, and of each method the mean change in points; then the "
    "share of draws that lose more than a point, and the worst draw."
)
NOTHING = "Not recorded yet: `python -m bench.accuracy.wild`."


def changes(row: Row, method: str) -> np.ndarray:
    """Return the change against zero-shot of each draw, in points."""
    of_method, before = (np.asarray(row["accuracy"][x]) for x in (method, "zero_shot"))
    difference: np.ndarray = of_method - before
    return difference


def recorded(folder: Path) -> dict[str, list[Row]]:
    """Return the newest line of each scenario by family, in the order of `FAMILIES`."""
    rows = newest("wild", "family", "scenario", folder=folder)
    found = {(row["family"], row["scenario"]): row for row in rows}
    families = {
        family: [found[family, name] for name in names if (family, name) in found]
        for family, names in FAMILIES.items()
    }
    return {family: rows for family, rows in families.items() if rows}


def mean_changes(rows: list[Row], method: str) -> str:
    """Format the mean over scenarios of their mean change."""
    if not all(method in row["accuracy"] for row in rows):
        return ""
    return f"{np.mean([changes(row, method).mean() for row in rows]):+.1f}"


def losses(rows: list[Row], method: str) -> str:
    """Format the share of draws that are worse than zero-shot, and the worst draw."""
    if not all(method in row["accuracy"] for row in rows):
        return ""
    found = np.concatenate([changes(row, method) for row in rows])
    return f"{100 * (found < -WORSE).mean():.0f} %, {found.min():+.1f}"


def zero_shot(rows: list[Row]) -> str:
    """Format the mean over scenarios of zero-shot's mean accuracy."""
    return f"{np.mean([np.mean(row['accuracy']['zero_shot']) for row in rows]):.1f}"


def head(methods: Iterable[str] = METHODS) -> list[str]:
    """Return the names of the columns of `line`."""
    names = [METHODS[method] for method in methods]
    return ["zero-shot", *names, *(f"{name}: worse, worst" for name in names)]


def line(rows: list[Row], methods: Iterable[str] = METHODS) -> list[str]:
    """Return the figures of some scenarios: each method's mean change, then its losses."""
    means = [mean_changes(rows, method) for method in methods]
    return [zero_shot(rows), *means, *(losses(rows, method) for method in methods)]


def families(folder: Path) -> str:
    """Tabulate the families of scenarios."""
    found = recorded(folder)
    if not found:
        return NOTHING
    lines = [
        [family, str(sum(len(row["pool"]) for row in rows)), *line(rows, SHOWN)]
        for family, rows in found.items()
    ]
    parts = [TEXT, table(["family", "draws", *head(SHOWN)], lines)]
    return "\n\n".join([*parts, source([row for rows in found.values() for row in rows])])


def scenarios(folder: Path) -> str:
    """Tabulate every scenario of every family."""
    found = recorded(folder)
    if not found:
        return NOTHING
    parts = [TEXT]
    for family, rows in found.items():
        lines = [[row["scenario"], *line([row])] for row in rows]
        lines.append([f"**{x}**" if x else x for x in ["mean", *line(rows)]])
        parts.append(table([family, *head()], lines))
    return "\n\n".join([*parts, source([row for rows in found.values() for row in rows])])


def nearly_right(folder: Path) -> str:
    """Say what draws gain and lose where zero-shot is nearly right."""
    rows = [row for family in recorded(folder).values() for row in family]
    if not rows:
        return NOTHING
    before = np.concatenate([row["accuracy"]["zero_shot"] for row in rows])
    found = np.concatenate([changes(row, "default") for row in rows])[before >= NEARLY_RIGHT]
    return (
        f"Of {len(found)} draws with zero-shot at {NEARLY_RIGHT:.0f} % or more, "
        f"{(found < -WORSE).sum()} lose more than a point, the worst {-found.min():.1f}; the mean "
        f"gains {found.mean():.1f}."
    )


POOLS = {  # of `recorded`, with their text
    "whurs19 rn50": "WHU-RS19, CLIP RN50",
    "whurs19 vit-b-32": "WHU-RS19, CLIP ViT-B/32",
    "whurs19 vit-l-14": "WHU-RS19, CLIP ViT-L/14",
    "caltech101 among LVIS": "Caltech101 among the names of LVIS, ViT-B/32",
    "dtd, made text 41%": "DTD, ViT-B/32, made text",
    "dtd, made text 26%": "DTD, ViT-B/32, weaker made text",
    "oxford_pets": "Oxford Pets, ViT-B/32, class means as text",
    "dtd": "DTD, ViT-B/32, class means as text",
    "caltech101": "Caltech101, ViT-B/32, class means as text",
}
SITUATIONS = {
    "all classes": ("all", "each set, its own list"),
    "2 to 5 classes": ("2 to 5 classes, all rows",),
    "long tail": ("long tail",),
}


def of_pool(rows: list[Row], pool: str) -> str:
    """Format mean accuracies over the draws of a pool: zero-shot's → ours (as published)."""
    found = [
        [row["accuracy"][method][draw] for method in ("zero_shot", "default", "published")]
        for row in rows
        for draw, name in enumerate(row["pool"])
        if name == pool
    ]
    if not found:
        return ""
    before, ours, published = np.mean(found, 0)
    return f"{before:.1f} → {ours:.1f} ({published:.1f})"


def sets(folder: Path) -> str:
    """Tabulate each data set and backbone."""
    rows = [row for family in recorded(folder).values() for row in family]
    if not rows:
        return NOTHING
    parts = [[row for row in rows if row["scenario"] in names] for names in SITUATIONS.values()]
    lines = [[title, *(of_pool(part, pool) for part in parts)] for pool, title in POOLS.items()]
    shown = [row for part in parts for row in part]
    return "\n\n".join([table(["features", *SITUATIONS], lines), source(shown)])


def outliers(folder: Path) -> str:
    """Tabulate the area under the ROC curve of each pool."""
    rows = newest("outliers", "pool", "logit_scale", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.accuracy.outliers`."
    names = ["zero_shot", "outlier_score"]
    lines = [
        [row["pool"], f"{row['logit_scale']:g}", *(f"{np.mean(row['area'][x]):.3f}" for x in names)]
        for row in rows
    ]
    means = [np.mean([np.mean(row["area"][x]) for row in rows]) for x in names]
    lines.append(["**mean**", "", *(f"**{x:.3f}**" for x in means)])
    head = [
        "classes without a name found by",
        "logit scale",
        "zero-shot's confidence",
        "`outlier_score_`",
    ]
    return "\n\n".join([table(head, lines), source(rows)])


def centred_prior(folder: Path) -> str:
    """Tabulate the text prediction, and TransCLIP on it, before and after centring."""
    rows = newest("centred_prior", "scenario", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.accuracy.centred_prior`."
    variants = list(rows[0]["accuracy"])
    head = ["scenario", "problems", *variants]
    lines = []
    for row in rows:
        values = [row["accuracy"][x] for x in variants]
        before = [row["accuracy"][f"as it is: {x.partition(': ')[2]}"] for x in variants]
        worst = [np.min(np.subtract(x, y)) for x, y in zip(values, before, strict=True)]
        cells = [f"{np.mean(x):.2f} ({y:+.1f})" for x, y in zip(values, worst, strict=True)]
        lines.append([row["scenario"], str(len(values[0])), *cells])
    text = "Mean accuracy, and in brackets the worst change of a problem against the same as it is."
    return "\n\n".join([text, table(head, lines), source(rows)])


CONFIDENCES = ("z", "calibrated")
CALIBRATION_HEAD = ["scenario", "draws"] + [
    f"{name}: {figure}" for figure in ("error, mean / worst", "area") for name in CONFIDENCES
]


def calibration_line(draws: list[dict[str, dict[str, float]]]) -> list[str]:
    """Return the figures of a scenario."""
    errors = ([draw[name]["error"] for draw in draws] for name in CONFIDENCES)
    areas = ([draw[name]["area"] for draw in draws] for name in CONFIDENCES)
    return [
        str(len(draws)),
        *(f"{np.mean(x):.1f} / {max(x):.1f}" for x in errors),
        *(f"{np.mean(x):.3f}" for x in areas),
    ]


def calibration(folder: Path) -> str:
    """Tabulate how far confidences can be believed."""
    rows = newest("calibration", "family", "scenario", folder=folder)
    scenarios = [row for row in rows if row.get("draws")]
    if not scenarios:
        return "Not recorded yet: `python -m bench.accuracy.calibration`."
    lines = [[row["scenario"], *calibration_line(row["draws"])] for row in scenarios]
    return "\n\n".join([table(CALIBRATION_HEAD, lines), source(rows)])


GAMMAS = ("1/4", "1/8", "1/16", "1/32", "1/64", *(f"gamma {x}" for x in (0.002, 0.01, 0.02, 0.2)))
GAMMA_HEAD = ["shots of a class", *GAMMAS]


def gamma_lines(row: Row) -> list[list[str]]:
    """Return the change by each gamma on the sets that chose none, by shots of a class."""
    means = row["means"]["held out"]
    return [[n_shots, *(f"{of[name]:+.2f}" for name in GAMMAS)] for n_shots, of in means.items()]


def default_gamma(folder: Path) -> str:
    """Tabulate what gammas change where no validation rows choose one."""
    rows = newest("default_gamma", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.accuracy.default_gamma`."
    chosen = f"Share that is best on the choosing half: {rows[0]['chosen']}."
    return "\n\n".join([chosen, table(GAMMA_HEAD, gamma_lines(rows[0])), source(rows)])


def published(folder: Path) -> str:
    """Tabulate how many published accuracies are ours."""
    rows = newest("published", folder=folder)
    if not rows:
        return "Not recorded yet: `python -m bench.accuracy.published CHECKOUT`."
    row = rows[0]
    lines = [
        [name, f"{n:,}", str(sum(x["of"].endswith(f": {name}") for x in row["differing"]))]
        for name, n in row["equal"].items()
    ]
    norms = row["float32_norms"]
    parts = [table(["accuracies of", "equal", "differing"], lines)]
    parts += [
        f"- {x['of']}: {x['published']} images right as published, {x['ours']} here."
        for x in row["differing"]
    ]
    text = (
        f"With rows normalised in float32, {norms['changed']} of {norms['compared']} accuracies of "
        f"TransCLIP on features in half precision change, at most by {norms['most_images']} images "
        f"({norms['at']})."
    )
    return "\n\n".join([parts[0], "\n".join(parts[1:]), text, source(rows)])


BLOCKS = {
    "published": published,
    "sets": sets,
    "nearly-right": nearly_right,
    "wild": families,
    "wild-scenarios": scenarios,
    "outliers": outliers,
    "centred-prior": centred_prior,
    "calibration": calibration,
    "default-gamma": default_gamma,
}
