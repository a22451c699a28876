"""Linear probe (CLAP): prototypes that a penalty ties to the text, class by class."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from transclip_fast.data.feature_rows import unit
from transclip_fast.heads.base import PrototypeHead
from transclip_fast.heads.task import HeadTask
from transclip_fast.heads.training import trainable

MAX_ITERATIONS = 200
GRADIENT_TOLERANCE = 1e-6  # largest entry of the gradient at the minimum


def fit(task: HeadTask) -> PrototypeHead:
    """
    Prototypes unit(W) that minimise mean cross-entropy + sum_k c_k |w_k - t_k|^2.

    c_k is the confidence of zero-shot in the shots of class k: the better the text, the stronger
    the tie. Nothing is left to choose, so no validation set is used. A class without shots gets
    the mean c of the others.

    Source: Silva-Rodriguez et al. 2024, A Closer Look at the Few-Shot Adaptation of Large
    Vision-Language Models (CLAP). The authors' code (jusiro/CLAP) takes the mean over the K classes
    instead of the sum, and texts as the model gives them instead of unit rows: where these have
    norm r, its penalty is r^2 / K times this one. The minimum is found by L-BFGS, as CLIP's own
    linear probe was (Radford et al. 2021), instead of 300 epochs of SGD.
    """
    features, labels = task.shots.features, task.shots.labels
    penalties = constraints(task)
    weights = trainable(task.text)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        logits = task.logit_scale * features @ unit(weights).T
        loss = F.cross_entropy(logits, labels) + penalties @ (weights - task.text).square().sum(1)
        loss.backward()  # type: ignore[no-untyped-call]
        task.progress(min(calls, MAX_ITERATIONS), MAX_ITERATIONS)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return PrototypeHead(text=unit(weights.detach()), logit_scale=task.logit_scale)


def constraints(task: HeadTask) -> torch.Tensor:
    """c (K,): mean zero-shot probability of a class over its shots."""
    features, labels = task.shots.features, task.shots.labels
    probabilities = (task.logit_scale * features @ task.text.T).softmax(1)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    counts = torch.bincount(labels, minlength=len(task.text))
    ordered = own[labels.argsort(stable=True)].double()  # the same bits each time, also on a GPU
    means = torch.segment_reduce(ordered, "mean", lengths=counts).float()
    return torch.where(counts > 0, means, means[counts > 0].mean())
