"""How often few-shot warns that classes are in another order, rightly and wrongly.

On golden data (`TRANSCLIP_GOLDEN`), all classes or some of them, 1 to 16 shots a class: with labels
in their order, shuffled, or shifted by one; with the texts as they are, and blurred until zero-shot
accuracy is 40, 20 or 10 %, because a hard problem must not look like a wrong order.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from bench.accuracy.golden import problems, rows_of_each_class
from bench.common import record, unit_rows
from transclip_fast import TransCLIP

CLASSES = (4, 8, None)  # all
TARGETS = (1.0, 0.4, 0.2, 0.1)  # zero-shot accuracy; those at least twice as good as chance
SHOTS = (1, 2, 4, 16)
DRAWS = 12
HALVINGS = 10
Labels = dict[str, np.ndarray]


def blurred(
    rows: np.ndarray, texts: np.ndarray, labels: np.ndarray, target: float, seed: int
) -> np.ndarray:
    """Return texts (K, d) with enough noise for a zero-shot accuracy of `target`."""
    noise = unit_rows(np.random.default_rng(seed).normal(size=texts.shape))
    low, high = 0.0, 5.0
    for _ in range(HALVINGS if target < 1 else 0):
        middle = (low + high) / 2
        accuracy = ((rows @ unit_rows(texts + middle * noise).T).argmax(1) == labels).mean()
        low, high = (middle, high) if accuracy > target else (low, middle)
    return unit_rows(texts + low * noise)


def orders(labels: np.ndarray, n_classes: int, rng: np.random.Generator) -> Labels:
    """Return the labels of the shots in their order and in two wrong ones."""
    shuffled = rng.permutation(n_classes)
    while (shuffled == np.arange(n_classes)).mean() > 0.25:
        shuffled = rng.permutation(n_classes)
    return {"right": labels, "shuffled": shuffled[labels], "shifted": (labels + 1) % n_classes}


def warns(rows: np.ndarray, texts: np.ndarray, shots: np.ndarray, labels: np.ndarray) -> bool:
    """Return whether a fit warns of the order of the support."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TransCLIP(device="cpu", gamma=0.02, max_iter=0, inner_iter=1, n_neighbors=1).fit(
            rows, texts, support_features=shots, support_labels=labels
        )
    return any("support_labels: zero-shot labels match" in str(w.message) for w in caught)


def draws(
    features: np.ndarray, texts: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[tuple[object, ...], bool]]:
    """Yield ((classes, target, shots, order), warned) of every draw."""
    for n_classes in CLASSES:
        for target in TARGETS:
            if n_classes is not None and target < 1 and target < 1.5 / n_classes:
                continue
            for seed in range(DRAWS):
                rng = np.random.default_rng(seed)
                chosen = np.sort(rng.permutation(len(texts))[:n_classes])
                place = np.full(len(texts), -1)
                place[chosen] = np.arange(len(chosen))
                inside = place[labels] >= 0
                rows, truth = features[inside], place[labels[inside]]
                hard = blurred(rows, texts[chosen], truth, target, seed)
                for n in SHOTS:
                    shots = rows_of_each_class(truth, (n,), rng)[0]
                    queries = rng.permutation(np.setdiff1d(np.arange(len(rows)), shots))[:500]
                    for order, ordered in orders(truth[shots], len(chosen), rng).items():
                        warned = warns(rows[queries], hard, rows[shots], ordered)
                        yield (n_classes or "all", target, n, order), warned


def main(say: Callable[[str], None] = print) -> int:
    """Measure, record and print; the exit code."""
    total, warned = Counter[str](), Counter[str]()
    for _, features, texts, labels, _ in problems():
        rows, prototypes = features.astype(np.float32), unit_rows(texts.astype(np.float32))
        for (n_classes, target, n, order), found in draws(rows, prototypes, labels):
            hard = "as is" if target == 1 else f"blurred to {target:.0%}"
            key = f"{order}, {hard}, {n_classes} classes, {n} shots"
            total[key] += 1
            warned[key] += found
    record("class_order", {"draws": dict(total), "warned": dict(warned)})
    for part in ("right, as is", "right, blurred", "shuffled, as is", "shifted, as is"):
        keys = [key for key in total if key.startswith(part)]
        say(f"{part}: {sum(warned[k] for k in keys)} of {sum(total[k] for k in keys)} draws warn")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
