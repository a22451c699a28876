"""LABCLIP's linear map of texts, trained to tell captions from those with swapped attributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from transclip_fast.data.feature_rows import unit
from transclip_fast.data.pairs import PairFeatures
from transclip_fast.errors import InputError
from transclip_fast.store.linear_maps import linear_map

RATE = 1e-3  # of Adam


@dataclass(frozen=True)
class MapTraining:
    """
    Settings of `train_text_map`.

    Parameters
    ----------
    epochs : int
    batch_size : int
        Pairs of a step.
    logit_scale : float
        Of the model.
    held_out : float
        Share of the images whose pairs choose the epoch.
    seed : int
        Of the share and of the order.
    """

    epochs: int = 20
    batch_size: int = 256
    logit_scale: float = 100.0
    held_out: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class TextMap:
    """
    A trained map, and how it did on the pairs held out.

    Attributes
    ----------
    weight : Tensor (d, d) float32
        Texts t become unit(weight t), see `linear_map`.
    epoch : int
        The first of the best accuracy; 0 is the identity.
    accuracies, losses : list of float
        Of the pairs held out, after each epoch; the first is before the training.
    n_trained, n_held_out : int
        Pairs; of the latter those with a false caption are in the accuracies.
    """

    weight: torch.Tensor
    epoch: int
    accuracies: list[float]
    losses: list[float]
    n_trained: int
    n_held_out: int


def train_text_map(
    pairs: PairFeatures,
    training: MapTraining | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> TextMap:
    """
    Train a matrix, from the identity, so that mapped captions are closer to images than false ones.

    Adam at 1e-3 minimises `pair_loss`. The map of the epoch with the best accuracy on the pairs of
    images held out, right against false, is kept; where none is better than the identity, that.
    Captions of one image are never on both sides.

    Source: Koishigarina et al. 2025, CLIP Behaves like a Bag-of-Words Model Cross-modally but not
    Uni-modally (LABCLIP): one linear map of the text embeddings, both encoders frozen. The loss is
    that of NegCLIP (Yuksekgonul et al. 2023). The start, Adam's rate, batches and epochs are
    settings of this package, and so is training rows without a false caption beside the others.

    Raises
    ------
    InputError
        Fewer than two images, or no false caption among the pairs held out.

    Examples
    --------
    >>> draw = torch.Generator().manual_seed(0)
    >>> images, captions = torch.randn(2, 400, 8, generator=draw)
    >>> captions[:, :4] = images[:, :4]
    >>> negatives = torch.cat([-captions[:, :4], captions[:, 4:]], 1)
    >>> pairs = PairFeatures.of(*(unit(rows) for rows in (images, captions, negatives)))
    >>> found = train_text_map(pairs, MapTraining(epochs=5, batch_size=32, logit_scale=10))
    >>> found.weight.shape, found.accuracies[found.epoch] >= found.accuracies[0]
    (torch.Size([8, 8]), True)
    """
    training = training or MapTraining()
    draw = torch.Generator().manual_seed(training.seed)
    held = _held_out(pairs.images, training.held_out, draw)
    rows, judges = pairs.rows(~held), pairs.rows(held)
    if not judges.has_negative.any():
        raise InputError(
            f"pairs: none of the {len(judges):,} held out has a false caption; hold out more"
        )
    weight = torch.eye(pairs.images.shape[1], dtype=torch.float32).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=RATE)
    best, accuracies, losses = weight.detach().clone(), list[float](), list[float]()
    for epoch in range(training.epochs + 1):
        if epoch:
            order = torch.randperm(len(rows), generator=draw)
            for batch in torch.split(order, training.batch_size):
                optimizer.zero_grad()
                loss = pair_loss(weight, rows.rows(batch), training.logit_scale)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        accuracy = _accuracy(weight.detach(), judges)
        if epoch and accuracy > max(accuracies):
            best = weight.detach().clone()
        accuracies.append(accuracy)
        losses.append(_mean_loss(weight.detach(), judges, training))
        progress(epoch, training.epochs)
    chosen = accuracies.index(max(accuracies))
    return TextMap(best, chosen, accuracies, losses, len(rows), len(judges))


def pair_loss(weight: torch.Tensor, pairs: PairFeatures, logit_scale: float) -> torch.Tensor:
    """
    Half the cross-entropy of B images to captions, half that of B captions to images.

    An image chooses among the B captions and all false ones of the batch, a caption among the B
    images, as no image belongs to a false caption.
    """
    true = unit(pairs.captions @ weight.T)
    false = unit(pairs.negatives[pairs.has_negative] @ weight.T)
    logits = logit_scale * pairs.images @ torch.cat([true, false]).T  # (B, B + false)
    truth = torch.arange(len(pairs))
    to_images = logits[:, : len(pairs)].T
    return (F.cross_entropy(logits, truth) + F.cross_entropy(to_images, truth)) / 2


def _held_out(images: torch.Tensor, share: float, draw: torch.Generator) -> torch.Tensor:
    """Rows (N,) bool of a share of the different images, at least one and not all."""
    known: dict[bytes, int] = {}
    of_row = torch.tensor([known.setdefault(row.tobytes(), len(known)) for row in images.numpy()])
    if len(known) < 2:
        raise InputError("pairs: are of one image; two are needed, to train and to hold out")
    number = min(max(1, round(share * len(known))), len(known) - 1)
    held = torch.zeros(len(known), dtype=torch.bool)
    held[torch.randperm(len(known), generator=draw)[:number]] = True
    return held[of_row]


def _accuracy(weight: torch.Tensor, pairs: PairFeatures) -> float:
    """Percentage of the images with a false caption that are closer to the right one."""
    chosen = pairs.rows(pairs.has_negative)
    captions, negatives = (linear_map(x, weight) for x in (chosen.captions, chosen.negatives))
    margins = PairFeatures(chosen.images, captions, negatives).margins()
    return round(100 * float((margins > 0).double().mean()), 4)


def _mean_loss(weight: torch.Tensor, pairs: PairFeatures, training: MapTraining) -> float:
    """The loss of pairs in batches, in their order."""
    batches = torch.split(torch.arange(len(pairs)), training.batch_size)
    losses = [
        len(batch) * float(pair_loss(weight, pairs.rows(batch), training.logit_scale))
        for batch in batches
    ]
    return sum(losses) / len(pairs)
