"""Linear probe that starts from the text prototypes and is held near them, class by class."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from transclip_fast.heads.task import PrototypeHead, Task, unit
from transclip_fast.heads.training import trainable

ITERATIONS = 200
TOLERANCE = 1e-6  # of the largest entry of the gradient


def fit(task: Task) -> PrototypeHead:
    """
    Prototypes unit(W) that minimise mean cross-entropy + sum_k c_k |w_k - t_k|^2.

    c_k is how sure zero-shot is of the shots of class k: where the text does well, it holds. So
    there is nothing to choose, and no validation set is used. A class without shots gets the mean
    c of the others.

    Source: Silva-Rodriguez et al. 2024, A Closer Look at the Few-Shot Adaptation of Large
    Vision-Language Models (CLAP), on unit rows. The minimum is found by L-BFGS,
    as CLIP's own linear probe was (Radford et al. 2021), instead of 300 epochs of SGD.
    """
    features, labels = task.shots.features, task.shots.labels
    holds = constraints(task)
    (weights,) = trainable([task.text])
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        logits = task.logit_scale * features @ unit(weights).T
        loss = F.cross_entropy(logits, labels) + holds @ (weights - task.text).square().sum(1)
        loss.backward()  # type: ignore[no-untyped-call]
        task.progress(min(calls, ITERATIONS), ITERATIONS)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return PrototypeHead(text=unit(weights.detach()), logit_scale=task.logit_scale)


def constraints(task: Task) -> torch.Tensor:
    """c (K,): mean zero-shot probability that the shots of a class give to it."""
    features, labels = task.shots.features, task.shots.labels
    probabilities = (task.logit_scale * features @ task.text.T).softmax(1)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    counts = torch.bincount(labels, minlength=len(task.text))
    means = torch.bincount(labels, own, len(task.text)).float() / counts.clamp_min(1)
    return torch.where(counts > 0, means, means[counts > 0].mean())
