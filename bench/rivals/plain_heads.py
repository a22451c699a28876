"""Every head, written plainly from its formula in float64, for comparison with the library's.

Full batches until the loss stands still, even grids, none of the library's code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

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


def clip_adapter(a: Arrays, *, sides: Sequence[str] = ("image",)) -> np.ndarray:
    """Try ratios of 0.2 to 0.8, of one side after the other; starts as the library does."""
    ratios = dict.fromkeys(sides, 0.2)
    best, found = _adapted(a, ratios)
    for side in sides:
        start = ratios
        for ratio in (0.4, 0.6, 0.8):
            right, logits = _adapted(a, {**start, side: ratio})
            if right > best:
                best, found, ratios = right, logits, {**start, side: ratio}
    return found


def clip_adapter_blend(a: Arrays) -> np.ndarray:
    """Train both bottlenecks and the network of the ratios, which start at a half."""
    draw, text = torch.Generator().manual_seed(0), torch.tensor(a["text_features"])
    d = text.shape[1]
    image, texts = _bottleneck(draw, d), _bottleneck(draw, d)
    network = [_uniform(draw, d // 4, d, 2 * d) for _ in range(2)]
    ends = [torch.zeros(d // 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def logits(rows: np.ndarray) -> torch.Tensor:
        x = torch.tensor(rows)
        hidden = torch.relu(x @ network[0].T + text.mean(0) @ network[1].T)
        r, s = (1 / (1 + torch.exp(-hidden @ end[:, None])) for end in ends)  # (n, 1)
        mixed, adapted = r * _through(x, image) + (1 - r) * x, _through(text, texts)
        own = [s * adapted[k] + (1 - s) * text[k] for k in range(len(text))]  # (n, d) each
        return TAU * torch.stack([torch.cosine_similarity(mixed, of) for of in own], 1)

    weights = [*image, *texts, *network, *ends]
    _descend(weights, lambda: logits(a["support_features"]), a["support_labels"], 2e-3)
    with torch.no_grad():
        return logits(a["image_features"]).numpy()


def unmix_clip(a: Arrays) -> np.ndarray:
    """Take the alpha that is best on validation rows; starts as the library does."""
    best, found = -1.0, np.empty(0)
    for alpha in (7e-5, 7e-4, 7e-3):
        right, logits = _unmixed(a, alpha)
        if right > best:
            best, found = right, logits
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
    "clip-adapter-text": partial(clip_adapter, sides=("text",)),
    "clip-adapter-both": partial(clip_adapter, sides=("image", "text")),
    "clip-adapter-blend": clip_adapter_blend,
    "unmix-clip": unmix_clip,
    "taskres": task_res,
    "linear-probe": linear_probe,
}


def _adapted(a: Arrays, ratios: Mapping[str, float]) -> tuple[float, np.ndarray]:
    """Return the validation accuracy and logits of CLIP-Adapter with these ratios of its sides."""
    draw, d = torch.Generator().manual_seed(0), a["text_features"].shape[1]
    mlps = {side: _bottleneck(draw, d) for side in ratios}

    def mixed(rows: np.ndarray, side: str) -> torch.Tensor:
        x = torch.tensor(rows)
        if side not in ratios:
            return x
        return ratios[side] * _through(x, mlps[side]) + (1 - ratios[side]) * x

    def logits(rows: np.ndarray) -> torch.Tensor:
        return _cosines(mixed(rows, "image"), mixed(a["text_features"], "text"))

    weights = [w for mlp in mlps.values() for w in mlp]
    _descend(weights, lambda: logits(a["support_features"]), a["support_labels"], 2e-3)
    return _measured(a, logits)


def _unmixed(a: Arrays, alpha: float) -> tuple[float, np.ndarray]:
    """Return the validation accuracy and logits of Unmix-CLIP with this alpha."""
    draw, text = torch.Generator().manual_seed(0), torch.tensor(a["text_features"])
    d = text.shape[1]
    shapes = ((d // 2, d), (3 * d // 4, d), (d // 2, 3 * d // 4))
    image, *mlp = layers = [_uniform(draw, *shape, shape[1]) for shape in shapes]

    def logits(rows: np.ndarray) -> torch.Tensor:
        return _cosines(torch.tensor(rows) @ image.T, torch.relu(text @ mlp[0].T) @ mlp[1].T)

    def penalty() -> torch.Tensor:
        found, rows = torch.zeros(()), torch.relu(text @ mlp[0].T) @ mlp[1].T
        for i in range(len(rows)):
            products = torch.cosine_similarity(rows, rows[i : i + 1])
            others = torch.cat([products[:i], products[i + 1 :]])
            found = found + (products[i] - 1) ** 2 + 0.2 * others.square().sum()
        return alpha * found

    shots = a["support_features"], a["support_labels"]
    _descend(layers, lambda: logits(shots[0]), shots[1], 2e-3, penalty=penalty)
    return _measured(a, logits)


def _measured(a: Arrays, logits: Callable[[np.ndarray], torch.Tensor]) -> tuple[float, np.ndarray]:
    """Return the accuracy on validation rows, and the logits of the queries."""
    right = logits(a["validation_features"]).argmax(1).numpy() == a["validation_labels"]
    return float(right.mean()), logits(a["image_features"]).detach().numpy()


def _bottleneck(draw: torch.Generator, d: int) -> list[torch.Tensor]:
    return [_uniform(draw, d // 4, d, d), _uniform(draw, d, d // 4, d // 4)]


def _uniform(draw: torch.Generator, rows: int, columns: int, inputs: int) -> torch.Tensor:
    """Return weights of up to 1 / sqrt(inputs), which take gradients."""
    found: torch.Tensor = (2 * torch.rand(rows, columns, generator=draw) - 1).double() / inputs**0.5
    return found.requires_grad_()


def _through(x: torch.Tensor, mlp: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.relu(torch.relu(x @ mlp[0].T) @ mlp[1].T)


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
    penalty: Callable[[], torch.Tensor] | None = None,
) -> None:
    optimizer = torch.optim.Adam(parameters, lr=rate)
    before = float("inf")
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits(), torch.tensor(labels))
        if penalty is not None:
            loss = loss + penalty()
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
