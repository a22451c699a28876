"""The few operations on all N rows that the solver is made of, and who answers them."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, cast

import torch

from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.errors import InputError
from transclip_fast.types import Affinity, Assignments, Messages, Scores

if TYPE_CHECKING:
    from transclip_fast.types import Truncation

__all__ = ["BACKENDS", "Messages", "Operations", "choose_backend", "operations"]

BACKENDS = ("auto", "torch", "triton", "numba")


class Operations(Protocol):
    """
    What a backend answers. Features are (N, d) float32 unit rows.

    Rows of features and nodes, the rows of scores, z and affinity, may be numbered differently:
    `nodes` (N,) int64 is the node of each row of features; without it they are the same.
    """

    def session(self) -> AbstractContextManager[None]:
        """What a run takes place in; on a CPU torch computes on the calling thread alone in it."""

    def captured(
        self,
        step: Callable[[], None],
        renewed: Callable[[], Sequence[torch.Tensor]],
        features: UnitRows,
    ) -> Callable[[], None]:
        """
        A step to be taken again and again: as it is, or on a GPU, where that pays, recorded.

        Parameters
        ----------
        step : callable
            Reads nothing back to the host.
        renewed : callable
            The tensors that the next step takes from this one; after each call they, and all else
            that the step keeps, are up to date.
        features : Tensor or Rows (N, d)
            What it reads.
        """

    def start(
        self,
        features: UnitRows,
        weights: torch.Tensor | None,
        log_prior: torch.Tensor | None,
        *,
        out: Assignments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        z = y_hat, in the order of the features, and where the means start.

        Parameters
        ----------
        weights : Tensor (K, d) float32, optional
            Prototypes times the logit scale; log y_hat is the log_softmax of F V^T, or
        log_prior : Tensor (N, K) float32, optional
            given; -inf excludes a class.

        Returns
        -------
        normaliser : Tensor (N,) float32
            What log_softmax took off.
        values : Tensor (8, K) float32
            The largest log y_hat of each class, largest first (all rows when N < 8).
        rows : Tensor (8, K) int64
            Their rows; of equal ones the first come first.
        """

    def score(
        self,
        features: UnitRows,
        weights: torch.Tensor,
        offset: torch.Tensor,
        *,
        out: Scores,
        log_prior: torch.Tensor | None = None,
        prior_weight: float = 1.0,
        messages: Messages | None = None,
        nodes: torch.Tensor | None = None,
    ) -> Scores:
        """
        Base score b = F P^T + c (+ prior_weight log y_hat + messages); in the short form its
        candidates, relative to the log-sum-exp over all K classes.

        Parameters
        ----------
        weights, offset : Tensor (K, d), (K,) float32
            P and c.
        out : Scores
            Receives the result.
        log_prior : Tensor (N, K) float32, optional
            log y_hat of a prior that is not linear in the features.
        messages : Messages, optional
            Of the support, by rows of the features.
        """

    def sweep(
        self, base: Scores, affinity: Affinity, z: Assignments, *, out: Assignments
    ) -> Assignments:
        """
        z <- softmax_k(b + A z), every row from the z given (Jacobi).

        In the short form z is renewed at the candidates, and the mass of all other classes enters
        the normaliser as if no message reached them; `out.bound` says what that may misplace.

        Parameters
        ----------
        out : Assignments
            Receives the result; must not be `z`.
        """

    def class_sums(
        self, z: Assignments, features: UnitRows, nodes: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Z^T F (K, d) and the mass n_k (K,) of each class, float64.

        Mass that the short form dropped, of each row m_i and of all M, is shared among the
        classes as the kept mass is, pi_k: pi (sum_i m_i f_i)^T and pi_k M are added.
        """

    def energies(self, z: Assignments, affinity: Affinity) -> tuple[torch.Tensor, torch.Tensor]:
        """sum_ij A_ij z_i.z_j and sum_ik z_ik log z_ik of the mass kept, float64 scalars."""

    def expectation(
        self, z: Assignments, log_prior: torch.Tensor, nodes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """sum_ik z_ik log y_hat_ik of the mass kept, float64 scalar."""

    def sum_of_squares(self, features: UnitRows) -> torch.Tensor:
        """sum_i f_id^2, (d,) float64."""


def choose_backend(name: str, device: torch.device, truncation: Truncation | None) -> str:
    """
    Who answers: triton on a GPU and numba for the short form on a CPU, where they are installed;
    else torch.

    Raises
    ------
    InputError
        A backend that is not installed, or does not do what is asked of it.
    """
    wanted = name
    if name == "auto":
        on_cpu = "torch" if truncation is None else "numba"
        wanted = {"cuda": "triton", "cpu": on_cpu}.get(device.type, "torch")
    if wanted == "numba" and device.type != "cpu":
        raise InputError(f"backend={name!r} runs on a CPU only, not on {device}")
    if wanted == "numba" and truncation is None:
        raise InputError(f"backend={name!r} has no dense assignments; choose backend='torch'")
    if wanted == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f"backend={name!r} runs on a GPU, not on {device}; choose backend='torch', or set "
            "TRITON_INTERPRET=1 for a very slow trial"
        )
    if wanted == "torch":
        return wanted
    try:
        importlib.import_module(wanted)
    except ImportError as error:
        if name == wanted:
            raise InputError(f"backend={name!r}: {error}; pip install {name}") from error
        warnings.warn(
            f"computed in torch, slower: {error}; pip install {wanted}",
            stacklevel=3,
        )
        return "torch"
    return wanted


def operations(backend: str) -> Operations:
    """The operations of a backend that `choose_backend` named."""
    return cast(Operations, importlib.import_module(f"transclip_fast.ops.{backend}_backend"))


def backend_class(backend: str):  # type: ignore[no-untyped-def]
    m = importlib.import_module(f"transclip_fast.ops.{backend}_backend")

    class Ops:
        start = staticmethod(m.start)
        sum_of_squares = staticmethod(m.sum_of_squares)

        def __init__(self, affinity, nodes=None):  # type: ignore[no-untyped-def]
            self.affinity, self.nodes = affinity, nodes

        def score(self, features, score, *, out):  # type: ignore[no-untyped-def]
            return m.score(
                features,
                score.weights,
                score.offset,
                log_prior=score.log_prior,
                prior_weight=score.prior_weight,
                messages=score.messages,
                nodes=self.nodes,
                out=out,
            )

        def sweep(self, base, z, *, out):  # type: ignore[no-untyped-def]
            return m.sweep(base, self.affinity, z, out=out)

        def class_sums(self, z, features):  # type: ignore[no-untyped-def]
            return m.class_sums(z, features, self.nodes)

        def energies(self, z):  # type: ignore[no-untyped-def]
            return m.energies(z, self.affinity)

        def expectation(self, z, log_prior):  # type: ignore[no-untyped-def]
            return m.expectation(z, log_prior, self.nodes)

    return Ops
