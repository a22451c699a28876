"""The objective that the steps of the solver minimise (paper, equation 1)."""

from __future__ import annotations

import torch

from transclip_fast import ops
from transclip_fast.assignments import Assignments
from transclip_fast.graph import Affinity
from transclip_fast.mixture import Mixture, Moments
from transclip_fast.prior import Prior
from transclip_fast.support import Support


def objective(
    z: Assignments,
    mixture: Mixture,
    moments: Moments,
    affinity: Affinity,
    prior: Prior,
    prior_normaliser: torch.Tensor,
    *,
    likelihood_weight: float,
    kl_weight: float,
    support: Support | None = None,
    support_weight: float = 0.0,
) -> float:
    """
    L = - likelihood_weight * mixture - 1/2 * graph + KL, a sum over all queries.

    mixture = sum_ik z_ik (g_ik - 1/2 sum_d log sigma_d^2), graph = sum_ij A_ij z_i.z_j,
    KL = sum_ik z_ik (log z_ik - kl_weight log y_hat_ik). Few-shot adds the support's mixture term
    times `support_weight` (w N) and the messages it sends.

    Parameters
    ----------
    moments : Moments
        Of `z`: the mixture term and a linear prior follow from them without touching a row.
    prior_normaliser : Tensor (N,)
        What log_softmax subtracted in the prior.
    """
    given = prior.log_probabilities if kl_weight else None
    pairwise, entropy, log_prior = ops.energies(z, affinity, given)
    if prior.weights is not None:
        log_prior = (prior.weights * moments.sums).sum() - prior_normaliser.double().sum()
    likelihood = mixture.log_likelihood(moments)
    value = -0.5 * pairwise + entropy - kl_weight * log_prior
    if support is not None:
        likelihood = likelihood + support_weight * mixture.log_likelihood(support.moments)
        value = value - support.received(z.dense())
    return float(value - likelihood_weight * likelihood)
