"""The whole method in float64 numpy, written from the paper: the truth of every other test.

Dense and slow on purpose: N x N similarities, the N x K x d mixture term one class at a time.
Symbols follow the paper: N queries, M support rows, K classes, d dimensions, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

GAMMAS = (0.002, 0.01, 0.02, 0.2)
KNOWN_WEIGHT = 3  # a query of known class counts as so many in the mixture
ENOUGH_SHOTS = 4  # of every class; fewer are few-shot only where all classes have the same number


@dataclass
class Parameters:
    n_neighbors: int = 3
    max_iter: int = 10
    inner_iter: int = 5
    logit_scale: float = 100.0
    kl_weight: float | None = None  # lambda: 1 zero-shot, 0.5 few-shot
    likelihood_weight: float = 1 / 50
    unit_means: bool = True
    update_means: bool = True
    update_variance: bool = True
    covariance: str = "diagonal"
    graph_mode: str = "symmetric"
    clamp_similarity: bool = False
    class_cost: bool | str = "auto"  # not in the paper; "auto" where few of the classes occur
    published_support_rows: bool = False  # the published code's few-shot graph, errors and all


@dataclass
class Solution:
    z: np.ndarray  # (N, K)
    means: np.ndarray  # (K, d)
    variances: np.ndarray  # (d,)
    objective: list[float] = field(default_factory=list)
    gamma: float | None = None


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def log_prior(features, prototypes, logit_scale=100.0):
    """log y_hat (N, K) of a linear prior."""
    return log_softmax(logit_scale * features @ prototypes.T)


def knn_weights(rows, queries, k, same, clamp):
    """W (rows, N): each row's k most similar queries, weighted by the inner product."""
    similarity = rows @ queries.T
    allowed = similarity.copy()
    if same:  # a query is not its own neighbour
        np.fill_diagonal(allowed, -np.inf)
    k = min(k, len(queries) - same)
    weights = np.zeros_like(similarity)
    nearest = np.argsort(-allowed, axis=1, kind="stable")[:, :k]
    np.put_along_axis(weights, nearest, np.take_along_axis(similarity, nearest, 1), 1)
    return np.maximum(weights, 0) if clamp else weights


def log_gaussian(features, means, variances):
    """g (N, K), without the log-determinant."""
    return np.stack([-0.5 * ((features - m) ** 2 / variances).sum(1) for m in means], axis=1)


def start_means(features, z, support, labels):
    means = np.empty((z.shape[1], features.shape[1]))
    for c in range(z.shape[1]):
        shots = support[labels == c] if support is not None else []
        if len(shots):
            means[c] = shots.sum(0)
        else:
            top = np.argsort(-z[:, c], kind="stable")[:8]
            # A class that the prior excludes everywhere starts at the plain mean.
            weights = z[top, c] if z[top, c].any() else np.ones(len(top))
            means[c] = weights @ features[top]
    return unit(means)


def effective_classes(y_hat):
    """exp of the entropy of the mean of y_hat (N, K): how many classes it spreads over."""
    mean = y_hat.mean(0)
    return np.exp(-(mean * np.log(np.where(mean > 0, mean, 1))).sum())


def sharpness(log_y, graph):
    """T from 1 to 16: softmax(T log y_hat) is as confident as neighbours agree on its labels."""
    labels = log_y.argmax(1)
    rows, neighbors = np.nonzero(graph)
    if not len(rows):
        return 1.0
    agreement = (labels[rows] == labels[neighbors]).mean()

    def confidence(power):
        return np.exp(log_softmax(power * log_y)).max(1).mean()

    low, high = 1.0, 16.0
    if confidence(low) >= agreement:
        return low
    if confidence(high) < agreement:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if confidence(middle) < agreement else (low, middle)
    return low


def class_cost(z, dim):
    """w and beta: a class of mass n costs w beta n / (n + beta)."""
    n, n_classes = z.shape
    effective = effective_classes(z)
    full = min(1, n / (8 * effective))
    f = max(0, 1 - effective / (0.8 * n_classes)) ** (2 - full)
    return f * (60 + 60 * full) * dim / 512, max(1, 0.05 * n / effective)


def decided(run, log_y, graph, few_shot, p):
    """With `class_cost="auto"`: the published method, with a class cost, or what is plausible."""
    n_classes = log_y.shape[1]
    used = effective_classes(np.exp(log_softmax(sharpness(log_y, graph) * log_y)))
    with_cost = replace(p, class_cost=True)
    if used < 0.25 * n_classes and not few_shot:
        return run(parameters=with_cost)
    free = run(parameters=replace(p, class_cost=False))
    if few_shot or used >= 0.8 * n_classes:
        return free
    if p.max_iter >= 4:  # the fourth step updates z as the end of three steps does
        tried = run(parameters=replace(with_cost, max_iter=3))
        if plausibility(tried.z, graph) < plausibility(free.z, graph) - 0.01:
            return free
    both = run(parameters=with_cost), free
    return max(both, key=lambda solution: plausibility(solution.z, graph))


def plausibility(z, graph):
    """The share of neighbours that have the same label, and a tenth of the entropy of the sizes."""
    labels = z.argmax(1)
    rows, neighbors = np.nonzero(graph)
    one_hot = np.eye(z.shape[1])[labels]
    shared = (labels[rows] == labels[neighbors]).mean() if len(rows) else 0.0
    return shared + 0.1 * np.log(effective_classes(one_hot))


def solve(
    features,
    log_y,
    *,
    support=None,
    labels=None,
    gamma=None,
    known=None,
    parameters=None,
    graph=None,
    support_graph=None,
):
    """
    One run at one gamma; `support` (M, d) and `labels` (M,) make it few-shot.

    Without gamma the support leaves all else as in zero-shot, and its rows weigh as known ones do.
    `known` (N,) has the class of a query where it is known and -1 elsewhere: z is fixed there.
    `graph` (N, N) and `support_graph` (M, N) are W where duplicates leave the neighbours open.
    """
    p = parameters or Parameters()
    f = np.asarray(features, np.float64)
    n, d = f.shape
    n_classes = log_y.shape[1]
    few_shot = gamma is not None
    lam = p.kl_weight if p.kl_weight is not None else (0.5 if few_shot else 1.0)
    s = np.zeros((0, d)) if support is None else np.asarray(support, np.float64)
    y = np.zeros((0, n_classes)) if support is None else np.eye(n_classes)[labels]  # (M, K)
    if graph is None:
        graph = knn_weights(f, f, p.n_neighbors, True, p.clamp_similarity)  # W (N, N)
    if p.class_cost == "auto":
        options = {"support": support, "labels": labels, "gamma": gamma, "known": known}
        options |= {"graph": graph, "support_graph": support_graph}
        return decided(partial(solve, features, log_y, **options), log_y, graph, few_shot, p)
    w = 50 * gamma / len(s) if few_shot else KNOWN_WEIGHT / n
    known = np.full(n, -1) if known is None else np.asarray(known)
    counted = np.where(known >= 0, KNOWN_WEIGHT, 1)[:, None]  # (N, 1)

    def fixed(z):
        """z with the rows of known queries at their class."""
        return np.where(known[:, None] >= 0, known[:, None] == np.arange(n_classes), z)

    if p.graph_mode == "symmetric":
        a = (graph + graph.T) / (2 * p.n_neighbors)
    else:
        a = graph / p.n_neighbors
    if support_graph is None:
        support_graph = knn_weights(s, f, p.n_neighbors, False, p.clamp_similarity)  # (M, N)

    def messages_to_queries(z):
        """Messages (N, K) of neighbours and shots to the queries."""
        return a @ z + support_graph.T / (2 * p.n_neighbors) @ y

    if few_shot and p.published_support_rows:
        # A shot loses its most similar query, W stacks [support; query], z stacks [query; support].
        best = knn_weights(s, f, 1, False, p.clamp_similarity)
        more = knn_weights(s, f, p.n_neighbors + 1, False, p.clamp_similarity)
        stacked = np.concatenate([more - best, graph])  # W (M + N, N)

        def messages_to_queries(z):
            sums = stacked.T @ np.concatenate([z, y]) + (stacked @ z)[:n]
            return sums / (2 * p.n_neighbors)

    y_hat = np.exp(log_y)
    means = start_means(f, y_hat, support if few_shot else None, labels)
    variances = np.full(d, 1 / d)
    kl_term = lam * log_y if lam else np.zeros_like(log_y)
    weight, beta = 0.0, 1.0
    sharp = log_softmax(sharpness(log_y, graph) * log_y)
    z = fixed(y_hat)
    if p.class_cost:
        if few_shot:
            score = kl_term + p.likelihood_weight * log_gaussian(f, means, variances)
        else:
            score = sharp
            z = fixed(np.exp(log_softmax(score)))
        for _ in range(p.inner_iter):
            z = fixed(np.exp(log_softmax(score + messages_to_queries(z))))
        weight, beta = class_cost(z, d)
        if few_shot:  # the shots remain the means
            weight *= lam
        else:
            means = np.where(z.sum(0)[:, None] > 0, unit(z.T @ f), means)
    objective = []
    for step in range(p.max_iter + 1):
        score = p.likelihood_weight * log_gaussian(f, means, variances) + kl_term
        score = score - weight * (beta / (z.sum(0) + beta)) ** 2
        for _ in range(p.inner_iter):
            z = fixed(np.exp(log_softmax(score + messages_to_queries(z))))
        if step < p.max_iter:
            numerator = (counted * z).T @ f / n + w * y.T @ s  # (K, d)
            count = (counted * z).sum(0) / n + w * y.sum(0)  # (K,)
            if p.update_means:
                has_mass = count > 0
                means = means.copy()
                means[has_mass] = numerator[has_mass] / count[has_mass, None]
                if p.unit_means:
                    means[has_mass] = unit(means[has_mass])
            if p.update_variance:
                mass = counted * z
                spread = sum(((f - m) ** 2 * mass[:, [c]]).sum(0) for c, m in enumerate(means)) / n
                if len(s):
                    spread = spread + w * ((s - means[labels]) ** 2).sum(0)
                variances = np.maximum(spread / (counted.mean() + w * len(s)), 1e-6 / d)
                if p.covariance == "isotropic":
                    variances = np.full(d, variances.mean())
        objective.append(
            _objective(
                f, z, counted, means, variances, messages_to_queries, kl_term, s, labels, w * n, p
            )
            + weight * beta * (z.sum(0) / (z.sum(0) + beta)).sum()
        )
    return Solution(z, means, variances, objective, gamma)


def _objective(
    f, z, counted, means, variances, messages_to_queries, kl_term, s, labels, support_weight, p
):
    log_det = 0.5 * np.log(variances).sum()
    value = (
        -p.likelihood_weight * (counted * z * (log_gaussian(f, means, variances) - log_det)).sum()
    )
    if len(s):
        own = log_gaussian(s, means, variances)[np.arange(len(s)), labels] - log_det
        value -= p.likelihood_weight * support_weight * own.sum()
    of_support = messages_to_queries(np.zeros_like(z))
    value -= (z * (0.5 * (messages_to_queries(z) - of_support) + of_support)).sum()
    entropy = (z * np.log(np.where(z > 0, z, 1))).sum()
    # Of classes that the prior excludes only known queries have mass, a constant that is left out.
    return value + entropy - (z * np.where(kl_term > -np.inf, kl_term, 0)).sum()


def enough_shots(labels, n_classes):
    """Whether shots without a gamma are few-shot: equally many of each class, or enough."""
    shots = np.bincount(labels, minlength=n_classes)
    return shots.min() >= min(ENOUGH_SHOTS, shots.max())


def zero_shot(features, prototypes, parameters=None, known=None):
    f = np.asarray(features, np.float64)
    p = parameters or Parameters()
    log_y = log_prior(f, np.asarray(prototypes, np.float64), p.logit_scale)
    return solve(f, log_y, known=known, parameters=p)


def few_shot(features, prototypes, support, labels, gamma=None, validation=None, parameters=None):
    """
    Few-shot with a given gamma, or the best of GAMMAS on `validation` (rows, labels).

    Uneven shots, too few of some class, are not few-shot unless gamma is given.
    """
    f = np.asarray(features, np.float64)
    p = parameters or Parameters()
    log_y = log_prior(f, np.asarray(prototypes, np.float64), p.logit_scale)
    enough = enough_shots(labels, log_y.shape[1])
    runs = [
        solve(f, log_y, support=support, labels=labels, gamma=g, parameters=p)
        for g in (GAMMAS if gamma is None and enough else (gamma,))
    ]
    if len(runs) == 1:
        return runs[0]
    rows, truth = validation
    nearest = (np.asarray(rows, np.float64) @ f.T).argmax(1)
    accuracy = [(run.z[nearest].argmax(1) == truth).mean() for run in runs]
    return runs[int(np.argmax(accuracy))]


def predict(features, solution, log_y, kl_weight, likelihood_weight=1 / 50):
    """z (N, K) of new rows from the fitted mixture and the prior, no messages."""
    g = log_gaussian(np.asarray(features, np.float64), solution.means, solution.variances)
    return np.exp(log_softmax(likelihood_weight * g + kl_weight * log_y))


def calibrated_confidences(log_p, z, neighbors):
    """c_ik = (p_ik (z_bar_ik + 1e-4))^(1/4), the label's share of a row; -1 is no neighbour."""
    neighbor_means = np.array(
        [np.mean([z[j] for j in row if j >= 0] or [0 * z[0]], axis=0) for row in neighbors]
    )
    c = np.exp(log_softmax((log_p + np.log(neighbor_means + 1e-4)) / 4))
    return c[np.arange(len(z)), z.argmax(1)]


def tempered_tail(tail, least, number):
    """
    log sum_k m_k^(1/4) of `number` classes with a mass of `tail` in all, the largest e^`least`.

    They fall as least e^(-x least / tail), or share the tail evenly if that is less.
    """
    tail, least = np.asarray(tail, float), np.asarray(least, float)
    with np.errstate(divide="ignore"):
        falling = np.log(4 * tail) - 0.75 * least  # the integral over x > 0 of its 4th root
        even = np.log(number) + np.log(tail / number) / 4
    return np.minimum(falling, even)


def largest(values, width, threshold):
    """Bool (N, K): at most `width` entries a row, >= `threshold` (N,); the largest always stays."""
    threshold = np.minimum(np.broadcast_to(threshold, len(values)), values.max(1))
    order = np.argsort(-values, axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(values.shape[1])[None], 1)
    return (values >= threshold[:, None]) & (place < width)


def sparse_score(score, width, threshold):
    """log p (N, K) of the candidates, -inf for other classes, and the mass (N,) of these."""
    log_p = log_softmax(score)
    kept = largest(log_p, width, threshold)
    return np.where(kept, log_p, -np.inf), np.where(kept, 0, np.exp(log_p)).sum(1)


def sparse_sweep(log_p, tail, a, z, width, floor):
    """z at the candidates, without messages to other classes, and the mass this may misplace."""
    messages = a @ z
    candidate = np.isfinite(log_p)
    logits = np.where(candidate, log_p + messages, -np.inf)
    with np.errstate(divide="ignore"):
        logits = np.concatenate([logits, np.log(tail)[:, None]], axis=1)
    mass = np.exp(log_softmax(logits))[:, :-1]
    outside_max = np.where(candidate, 0, np.abs(messages)).max(1)
    known = np.maximum(tail, log_p.shape[1] * 2.0**-24)  # unknown below float32 rounding
    bound = np.minimum(known * np.expm1(np.minimum(outside_max, 64)), 1)
    return np.where(largest(mass, width, floor), mass, 0), bound


def sparse_sums(z, features):
    """Z^T F (K, d) and n (K,), with the dropped mass shared among classes like the kept mass."""
    dropped, share = 1 - z.sum(1), z.sum(0) / z.sum()
    return z.T @ features + np.outer(share, dropped @ features), z.sum(0) + share * dropped.sum()
