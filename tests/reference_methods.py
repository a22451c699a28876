"""The methods of the literature in float64 numpy, dense and from their formulas: the tests' truth.

N queries x, K texts t, M labelled rows s of classes y, d dimensions. Each returns z (N, K).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import digamma, gammaln
from sklearn.linear_model import LogisticRegression

from tests.reference import knn_weights, log_softmax, unit


def softmax(logits):
    return np.exp(log_softmax(logits))


def one_hot(y, k):
    return np.eye(k)[y]


def class_means(s, y, k):
    return np.stack([s[y == c].mean(0) for c in range(k)])


def distances(x, w):
    """|x_n - w_k| (N, K)."""
    return np.linalg.norm(x[:, None] - w, axis=2)


def zero_shot(x, t, tau=100.0):
    return softmax(tau * x @ t.T)


def stata(x, t, *, alpha=1.0, n_neighbors=3, max_iter=10, inner_iter=5, tau=100.0):
    k, n = len(t), len(x)
    w = knn_weights(x, x, n_neighbors, True, False)
    affinity = (w + w.T) / (2 * n_neighbors)
    log_y = log_softmax(tau * x @ t.T)
    z = np.exp(log_y)
    sigma0 = sum(z[:, [c]] * (x - t[c]) ** 2 for c in range(k)).sum(0) / n
    mu, sigma = t.copy(), np.tile(sigma0, (k, 1))
    for step in range(max_iter + 1):
        square = np.stack(
            [((x - m) ** 2 / v).sum(1) for m, v in zip(mu, sigma, strict=True)], axis=1
        )
        score = log_y - (square + np.log(sigma).sum(1)) / 100
        for _ in range(inner_iter):
            z = softmax(score + affinity @ z)
        if step == max_iter:
            return z
        for c in range(k):
            rows, weights = (z.argmax(1) == c).sum(), z[:, c] / z[:, c].sum()
            b = rows / (alpha + rows)
            m = weights @ x
            mu[c] = b * m / np.linalg.norm(m) + (1 - b) * t[c]
            mu[c] /= np.linalg.norm(mu[c])
            spread = weights @ (x - mu[c]) ** 2
            sigma[c] = b * spread + (1 - b) * (sigma0 + (t[c] - mu[c]) ** 2)
    return z


def rectified(x, s, y, k, *, n_rows=8, eps=10.0):
    means = class_means(s, y, k)
    shifted = x + s.mean(0) - x.mean(0)
    cosines = unit(shifted) @ unit(means).T
    prototypes = []
    for c in range(k):
        top = np.argsort(-cosines[:, c], kind="stable")[:n_rows]
        members = np.concatenate([s[y == c], shifted[top]])
        weights = np.exp(eps * unit(members) @ unit(means)[c])
        prototypes.append(weights @ members / weights.sum())
    return np.stack(prototypes)


def bd_cspn(x, s, y, k, *, tau=100.0, **settings):
    return softmax(tau * unit(x) @ unit(rectified(x, s, y, k, **settings)).T)


def laplacian_shot(x, s, y, k, *, n_neighbors=3, smoothness=0.7, weights=None):
    costs = distances(x, rectified(x, s, y, k)) ** 2
    if weights is None:
        weights = (knn_weights(x, x, n_neighbors, True, False) != 0).astype(float)
    z, energy = softmax(-costs), np.inf
    for step in range(20):
        z = softmax(-costs + smoothness * weights @ z)
        before = energy
        energy = (z * np.log(np.maximum(z, 1e-300)) + z * (costs - smoothness * weights @ z)).sum()
        if step > 1 and abs(energy - before) <= 1e-6 * abs(before):
            break
    return z


def dirichlet_mle(means):
    """alpha of the largest likelihood with these mean logs, by Newton's method on log alpha."""
    alpha = np.ones(len(means))

    def loss(u):
        a = np.exp(u)
        value = gammaln(a).sum() - gammaln(a.sum()) - ((a - 1) * means).sum()
        return value, a * (digamma(a) - digamma(a.sum()) - means)

    found = minimize(loss, np.log(alpha), jac=True, method="BFGS", options={"gtol": 1e-10})
    return np.exp(found.x)


def dirichlet_steps(alpha, means, steps=1000):
    """The published steps for one class: 1,000, or until nothing moves, tested every 50."""
    for step in range(steps):
        c = abs(2 * (digamma(alpha + 1) * alpha - gammaln(alpha + 1)) / alpha**2)
        b = digamma(alpha + 1) - digamma(alpha.sum()) - c * alpha - means
        after = (-b + np.sqrt(b**2 + 4 * c)) / (2 * c)
        moved = ((after - alpha) ** 2).sum() / (alpha**2).sum()
        alpha = after
        if step and step % 50 == 0 and moved < 1e-11:
            break
    return alpha


def em_dirichlet(x, t, s=None, y=None, *, share_weight=0.0, max_iter=20, hard=False):
    """With the N x K x K array that the product form avoids."""
    k = len(t)
    f = softmax(30 * x @ t.T)
    z, alpha = f.copy(), np.ones((k, k))
    for _ in range(max_iter):
        for c in range(k):
            total, count = z[:, c] @ np.log(f), z[:, c].sum()
            if s is not None:
                of_shots = (
                    np.log(softmax(30 * s[y == c] @ t.T)) if (y == c).any() else np.zeros((0, k))
                )
                total, count = total + of_shots.sum(0), count + len(of_shots)
            if count > 1e-15:
                alpha[c] = dirichlet_steps(alpha[c], total / count)
        density = gammaln(alpha.sum(1)) - gammaln(alpha).sum(1)
        density = density + ((alpha[None] - 1) * np.log(f)[:, None]).sum(2)
        z = softmax(density + share_weight * (np.log(z.mean(0) + 1e-15) + 1))
        if hard:
            z = one_hot(z.argmax(1), k)
    return z


def label_propagation(edges, y, k, *, alpha):
    """(I - alpha M)^-1 Y of the rows, where edges G (N, N + L) go to rows and labelled nodes."""
    n, nodes = edges.shape
    g = np.zeros((nodes, nodes))
    g[:n] = edges
    g = g + g.T
    root = np.sqrt(np.where(g.sum(1) > 0, g.sum(1), 1))
    m = g / root / root[:, None]
    seeds = np.zeros((nodes, k))
    seeds[n + np.arange(len(y)), y] = 1
    return np.linalg.solve(np.eye(nodes) - alpha * m, seeds)[:n]


def normalised(z):
    return z / z.sum(1, keepdims=True)


def nearest_weights(similarity, k, power):
    """The k largest of each row, max(0, similarity) to a power, else 0."""
    top = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    kept = np.zeros_like(similarity)
    np.put_along_axis(kept, top, np.take_along_axis(np.maximum(similarity, 0), top, 1), 1)
    return np.where(kept > 0, kept, 0) ** power


def zlap(x, s, y, k, *, n_neighbors=4, n_labels=5, gamma=5.0, alpha=0.3):
    images = x @ x.T
    np.fill_diagonal(images, -np.inf)
    edges = [nearest_weights(images, n_neighbors, 1), nearest_weights(x @ s.T, n_labels, gamma)]
    return normalised(label_propagation(np.concatenate(edges, 1), y, k, alpha=alpha))


def ecalp(x, t, s=None, y=None, *, n_neighbors=8, n_texts=3, n_shots=8, gamma=10.0, sweeps=3):
    """With texts, and shots s if there are any; labelled nodes keep their labels."""
    k, n = len(t), len(x)
    edges = [nearest_weights(unit(x * t.var(0, ddof=1)) @ unit(x).T, n_neighbors, gamma)]
    edges.append(nearest_weights(x @ t.T, n_texts, gamma))
    labels = np.arange(k)
    if s is not None:
        edges.append(nearest_weights(unit(x / s.var(0, ddof=1)) @ unit(s).T, n_shots, gamma))
        labels = np.concatenate([labels, y])
    edges = np.concatenate(edges, 1)
    g = np.zeros((edges.shape[1],) * 2)
    g[:n] = edges
    g = g + g.T
    root = 1 / (np.sqrt(g.sum(1)) + 1e-6)
    m = root[:, None] * g * root
    z = np.concatenate([np.zeros((n, k)), one_hot(labels, k)])
    for _ in range(sweeps):
        z[:n] = (m @ z)[:n]
    return normalised(z[:n])


def tim_logits(x, w, tau):
    return tau * (x @ w.T - (w**2).sum(1) / 2 - (x**2).sum(1)[:, None] / 2)


def tim_adm(x, s, y, k, *, tau=15.0, shots_weight=0.1, entropy_weight=0.1, max_iter=150):
    w, labels = class_means(s, y, k), one_hot(y, k)
    c, r = shots_weight / (1 + entropy_weight), len(s) / len(x)
    for _ in range(max_iter):
        p, p_s = softmax(tim_logits(x, w, tau)), softmax(tim_logits(s, w, tau))
        q = p ** (1 + entropy_weight)
        q = q / np.sqrt(q.sum(0))
        q = q / q.sum(1, keepdims=True)
        shots = labels.T @ s + w * p_s.sum(0)[:, None] - p_s.T @ s
        rows = q.T @ x + w * p.sum(0)[:, None] - p.T @ x
        w = (c * shots + r * rows) / (c * labels.sum(0) + r * q.sum(0))[:, None]
    return softmax(tau * unit(x) @ unit(w).T)


def entropy(p, alpha):
    """Of the last axis."""
    if alpha == 1:
        return -(p * np.log(p)).sum(-1)
    return (1 - (p**alpha).sum(-1)) / (alpha - 1)


def tim_loss(w, x, s, y, *, tau, shots_weight, entropy_weight, alpha):
    p = softmax(tim_logits(x, w, tau))
    cross = -log_softmax(tim_logits(s, w, tau))[np.arange(len(s)), y].mean()
    mean = p.mean(0)
    return shots_weight * cross - entropy(mean, alpha) + entropy_weight * entropy(p, alpha).mean()


def finetuning_loss(w, x, s, y, *, tau):
    cross = -log_softmax(-tau * distances(s, w))[np.arange(len(s)), y].mean()
    return cross + entropy(softmax(-tau * distances(x, w)), 1).mean()


def adam(loss, w, *, rate, steps, width=1e-6):
    """Adam with gradients from central differences."""
    first, second = np.zeros_like(w), np.zeros_like(w)
    for step in range(1, steps + 1):
        gradient = np.zeros_like(w)
        for place in np.ndindex(w.shape):
            moved = np.zeros_like(w)
            moved[place] = width
            gradient[place] = (loss(w + moved) - loss(w - moved)) / (2 * width)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        root = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        w = w - rate * first / (1 - 0.9**step) / root
    return w


def pt_map(x, s, y, k, *, rate=0.2, max_iter=10, max_scalings=1000, shares=None):
    f, g = (np.sqrt(np.maximum(rows, 0) + 1e-6) for rows in (x, s))
    labels = one_hot(y, k)
    mass = len(x) // k if shares is None else len(x) * shares / shares.sum()
    w = class_means(g, y, k)

    def plan():
        z = np.exp(-10 * distances(f, w) ** 2)
        z /= z.sum()
        for _ in range(max_scalings):
            before = z.sum(1)
            z = z / before[:, None]
            z = z * (mass / z.sum(0))
            if abs(before - z.sum(1)).max() < 1e-6:
                break
        return z

    for _ in range(max_iter):
        z = plan()
        moved = (labels.T @ g + z.T @ f) / (labels.sum(0) + z.sum(0))[:, None]
        w = w + rate * (moved - w)
    return normalised(plan())


def logistic_regression(x, s, y, c):
    model = LogisticRegression(C=c, tol=1e-10, max_iter=20000, solver="newton-cg")
    return model.fit(s, y).predict_proba(x)
