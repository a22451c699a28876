"""Every head, written plainly from its formula in float64, for comparison with the library's.

Full batches until the loss stands still, even grids, none of the library's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize

TAU = 100.0
Arrays = dict[str, np.ndarray]


def fit(name: str, arrays: Arrays) -> np.ndarray:
    """Return logits (N, K) of a head on the queries of FEATURES arrays."""
    wide = {key: a.astype(np.float64) if a.dtype.kind == "f" else a for key, a in arrays.items()}
    return PLAIN[name](wide)


def prompt_ensemble(a: Arrays) -> np.ndarray:
    """Score with the text itself: there is one template."""
    logits: np.ndarray = TAU * a["image_features"] @ a["text_features"].T
    return logits


def tip_adapter(a: Arrays) -> np.ndarray:
    """Search the published even grids of DTD for alpha and beta."""
    return _searched(a, a["support_features"])


def tip_adapter_f(a: Arrays) -> np.ndarray:
    """Train the keys with alpha = 1.17 and beta = 1, then search the grids."""
    keys = torch.tensor(a["support_features"], requires_grad=True)
    rows, text = torch.tensor(a["support_features"]), torch.tensor(a["text_features"])
    one_hot = torch.eye(len(text), dtype=torch.float64)[a["support_labels"]]

    def logits() -> torch.Tensor:
        return TAU * rows @ text.T + 1.17 * torch.exp(rows @ keys.T - 1) @ one_hot

    _descend([keys], logits, a["support_labels"], rate=1e-3)
    return _searched(a, keys.detach().numpy())


def clip_adapter(a: Arrays) -> np.ndarray:
    """Take the ratio of 0.2 to 0.8 that is best on validation rows; starts as the library does."""
    best, found = -1.0, np.empty(0)
    for ratio in (0.2, 0.4, 0.6, 0.8):
        draw, d = torch.Generator().manual_seed(0), a["text_features"].shape[1]
        down = (2 * torch.rand(d // 4, d, generator=draw) - 1).double() / d**0.5
        up = (2 * torch.rand(d, d // 4, generator=draw) - 1).double() / (d // 4) ** 0.5
        layers = [down.requires_grad_(), up.requires_grad_()]

        def logits(
            rows: np.ndarray, mlp: Sequence[torch.Tensor] = layers, r: float = ratio
        ) -> torch.Tensor:
            x = torch.tensor(rows)
            mixed = r * torch.relu(torch.relu(x @ mlp[0].T) @ mlp[1].T) + (1 - r) * x
            return _cosines(mixed, torch.tensor(a["text_features"]))

        _descend(layers, lambda: logits(a["support_features"]), a["support_labels"], 2e-3)
        right = logits(a["validation_features"]).argmax(1).numpy() == a["validation_labels"]
        if right.mean() > best:
            best, found = right.mean(), logits(a["image_features"]).detach().numpy()
    return found


def task_res(a: Arrays) -> np.ndarray:
    """Train a residual with alpha = 0.5 on every text prototype."""
    text = torch.tensor(a["text_features"])
    residual = torch.zeros_like(text, requires_grad=True)

    def logits(rows: np.ndarray) -> torch.Tensor:
        return _cosines(torch.tensor(rows), text + 0.5 * residual)

    _descend([residual], lambda: logits(a["support_features"]), a["support_labels"], rate=1e-3)
    return logits(a["image_features"]).detach().numpy()


def linear_probe(a: Arrays) -> np.ndarray:
    """Minimise CLAP's objective by scipy's L-BFGS, with the gradient written out."""
    rows, labels, text = a["support_features"], a["support_labels"], a["text_features"]
    one_hot = np.eye(len(text))[labels]
    zero_shot = _softmax(TAU * rows @ text.T)[np.arange(len(rows)), labels]
    holds = np.array([zero_shot[labels == k].mean() for k in range(len(text))])

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(text.shape)
        norms = np.linalg.norm(weights, axis=1, keepdims=True)
        unit = weights / norms
        p = _softmax(TAU * rows @ unit.T)
        entropy = -np.log(p[np.arange(len(rows)), labels]).mean()
        by_unit = TAU * (p - one_hot).T @ rows / len(rows)  # (K, d)
        by_weight = (by_unit - unit * (by_unit * unit).sum(1, keepdims=True)) / norms
        away = weights - text
        total = entropy + (holds * np.square(away).sum(1)).sum()
        return total, (by_weight + 2 * holds[:, None] * away).ravel()

    found = minimize(loss, text.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    weights = found.x.reshape(text.shape)
    unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    logits: np.ndarray = TAU * a["image_features"] @ unit.T
    return logits


PLAIN: dict[str, Callable[[Arrays], np.ndarray]] = {
    "prompt-ensemble": prompt_ensemble,
    "tip-adapter": tip_adapter,
    "tip-adapter-f": tip_adapter_f,
    "clip-adapter": clip_adapter,
    "taskres": task_res,
    "linear-probe": linear_probe,
}


def _tip(a: Arrays, rows: np.ndarray, keys: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    one_hot = np.eye(len(a["text_features"]))[a["support_labels"]]
    cached = np.exp(-beta * (1 - rows @ keys.T)) @ one_hot
    logits: np.ndarray = TAU * rows @ a["text_features"].T + alpha * cached
    return logits


def _searched(a: Arrays, keys: np.ndarray) -> np.ndarray:
    best, chosen = -1.0, (1.17, 1.0)
    for beta in np.linspace(0.1, 13, 40):
        for alpha in np.linspace(0.1, 13, 20):
            logits = _tip(a, a["validation_features"], keys, alpha, beta)
            right = float((logits.argmax(1) == a["validation_labels"]).mean())
            if right > best:
                best, chosen = right, (float(alpha), float(beta))
    return _tip(a, a["image_features"], keys, *chosen)


def _descend(
    parameters: Sequence[torch.Tensor],
    logits: Callable[[], torch.Tensor],
    labels: np.ndarray,
    rate: float,
    steps: int = 500,
) -> None:
    optimizer = torch.optim.Adam(parameters, lr=rate)
    before = float("inf")
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits(), torch.tensor(labels))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if abs(before - loss.item()) < 1e-6:
            break
        before = loss.item()


def _cosines(rows: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Return tau times the cosines (n, K)."""
    unit, other = (x / x.norm(dim=1, keepdim=True) for x in (rows, prototypes))
    return torch.matmul(TAU * unit, other.T)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    p: np.ndarray = e / e.sum(1, keepdims=True)
    return p
