"""The input of a fit: checked (`Problem`), resolved (`Settings`), on the device (`Inputs`)."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from transclip_fast.data.checks import (
    as_unit_rows,
    is_aligned,
    unit_sample,
    unread_matrix,
)
from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.data.labelled_rows import LabelledRows, as_labelled_rows
from transclip_fast.data.npy_shards import StoredRows
from transclip_fast.data.texts import ensemble, warn_of_equal_rows
from transclip_fast.device import exact_float32, resolve_device
from transclip_fast.errors import InputError, user_level
from transclip_fast.graph.exact import nearest_of_all
from transclip_fast.memory import limit_of, parse_memory
from transclip_fast.metrics import check_class_order
from transclip_fast.ops import choose_backend
from transclip_fast.ops.exchange import Exchange, Partition
from transclip_fast.ops.ranked import RankedRows
from transclip_fast.ranks import ALONE, Ranks, check_same
from transclip_fast.solver.class_cost import may_be_undecided
from transclip_fast.solver.known import KnownRows, known_classes
from transclip_fast.solver.layout import Layout, Size, choose_layout
from transclip_fast.solver.parameters import GAMMAS, Parameters
from transclip_fast.solver.prior import GivenPrior, LinearPrior, Prior, given_prior
from transclip_fast.solver.support import Support, default_gamma, enough
from transclip_fast.solver.truncation import choose_truncation
from transclip_fast.types import Truncation
from transclip_fast.version import __version__

PRIOR_SAMPLE_ROWS = 512  # enough to know the mean mass of the largest classes to about 1 %
ORDER_SAMPLE_ROWS = 4096  # of known class, enough to see that the classes are in another order


@dataclass(frozen=True)
class Problem:
    """
    The checked input of a fit, on the CPU; the features are not read yet.

    Parameters
    ----------
    features : Tensor or StoredRows (N, d)
        Of any float type.
    in_file : bool
        Whether the features are in files.
    prior : Prior
        y_hat.
    zero_shot : Prior
        The prior of the text features if there are any, else `prior`.
    support, validation : LabelledRows, optional
        Labelled rows that take part, and that choose gamma.
    known : Tensor (N,) int64, optional
        Class of each query, -1 where it is unknown.
    corrected : bool
        Whether known queries were picked as they seemed wrong: then zero-shot's errors among them
        say nothing of the order of the classes.
    exchange : Exchange, optional
        With the other processes that share the rows; a prior (N, K) is then that of own rows.
    """

    features: torch.Tensor | StoredRows
    in_file: bool
    prior: Prior
    zero_shot: Prior
    support: LabelledRows | None
    validation: LabelledRows | None
    known: torch.Tensor | None
    corrected: bool = False
    exchange: Exchange | None = None

    @classmethod
    def check(
        cls,
        X: Any,
        text_features: Any = None,
        *,
        logit_scale: float,
        prior: Any = None,
        prior_logits: Any = None,
        prototypes: Any = None,
        support_features: Any = None,
        support_labels: Any = None,
        validation_features: Any = None,
        validation_labels: Any = None,
        known_labels: Any = None,
        ranks: Ranks | None = None,
    ) -> Problem:
        """
        Check the arrays of `TransCLIP.fit`, which documents them; `ranks` share their rows.

        Raises
        ------
        InputError
            An array that cannot be used, arrays that do not fit each other, or no prior.
        """
        matrix = unread_matrix(X, "X")
        n_rows, d = matrix.shape
        exchange = None if ranks is None else Exchange(Partition(n_rows, ranks))
        if sum(x is not None for x in (prior, prior_logits, prototypes)) > 1:
            raise InputError("give one of prior, prior_logits and prototypes, not several")

        chosen: Prior | None = None
        if prior is not None or prior_logits is not None:
            own = None if exchange is None else exchange.partition.rows
            chosen = given_prior(prior, prior_logits, rows=n_rows, own=own)
        elif prototypes is not None:
            rows = as_unit_rows(prototypes, "prototypes", columns=d)
            chosen = _linear_prior(rows, "prototypes", logit_scale)
        text = None
        if text_features is not None:
            rows = ensemble(text_features, d, None if chosen is None else chosen.n_classes)
            text = _linear_prior(rows, "text_features", logit_scale)
        chosen = chosen or text
        if chosen is None:
            shots = "; for the shots alone, a uniform prior: np.full((N, K), 1 / K)"
            raise InputError(
                "no text features and no prior: give text_features, prototypes, prior or "
                f"prior_logits{'' if support_features is None else shots}"
            )
        n_classes = chosen.n_classes
        if text is not None and text.n_classes != n_classes:
            raise InputError(f"text_features: has {text.n_classes} classes, the prior {n_classes}")
        return cls(
            matrix,
            isinstance(X, np.memmap | StoredRows),
            chosen,
            text or chosen,
            as_labelled_rows("support", support_features, support_labels, d, n_classes),
            as_labelled_rows("validation", validation_features, validation_labels, d, n_classes),
            known_classes(known_labels, n_rows, n_classes, of_texts=text is not None),
            exchange=exchange,
        )

    def gammas(self, parameters: Parameters) -> Sequence[float | None]:
        """The weights of the support to try; (None,) in zero-shot, with few or uneven shots too."""
        if self.support is None:
            return (None,)
        if parameters.gamma is not None:
            return (parameters.gamma,)
        if not enough(self.support.labels, self.prior.n_classes):
            return (None,)
        if self.validation is None:
            return (default_gamma(len(self.support), self.prior.n_classes),)
        return GAMMAS

    def size(self, parameters: Parameters, device: torch.device, ranks: int | None = None) -> Size:
        """The sizes on which memory depends, by default for the processes that there are."""
        n_rows, dim = self.features.shape
        if ranks is None:
            ranks = 1 if self.exchange is None else self.exchange.ranks.size
        whole = n_rows * dim * self.features.dtype.itemsize
        in_place = isinstance(self.features, torch.Tensor) and is_aligned(self.features)
        gammas = self.gammas(parameters)
        labelled = (rows for rows in (self.support, self.validation) if rows is not None)
        return Size(
            n_rows,
            self.prior.n_classes,
            dim,
            parameters.n_neighbors,
            file_bytes=whole if self.in_file else 0,
            input_bytes=0 if self.in_file else whole,
            copied=self.in_file or not in_place or device.type != "cpu",
            linear=isinstance(self.prior, LinearPrior),
            runs=len(gammas),
            undecided=may_be_undecided(parameters.class_cost, few_shot=None not in gammas),
            halved=parameters.precision == "float16",
            labelled=sum(map(len, labelled)),
            known=self.known is not None,
            ranks=ranks,
        )

    def facts(self, parameters: Parameters) -> dict[str, str]:
        """Hashes and texts that must be equal in all processes that share the rows."""
        ids = evenly_spaced_rows(len(self.features), PRIOR_SAMPLE_ROWS)
        prior = self.prior.sample if isinstance(self.prior, GivenPrior) else self.prior.weights
        arrays = {
            "support": self.support,
            "validation": self.validation,
            "known labels": self.known,
            "prior": prior,
            "text features": self.zero_shot.weights,
        }
        return {
            "version": __version__,
            "parameters": json.dumps(_deciding(parameters), sort_keys=True),
            "features": f"{tuple(self.features.shape)} {_hash(unit_sample(self.features, ids))}",
            **{name: _hash(array) for name, array in arrays.items()},
        }

    def limit(self, parameters: Parameters, device: torch.device) -> int:
        """The bytes that the user allows, or that are free; the least of all processes."""
        ranks = ALONE if self.exchange is None else self.exchange.ranks
        limit = limit_of(device, parse_memory(parameters.memory), ranks.on_this_machine)
        return min(map(int, ranks.all_gather(limit)))

    @exact_float32()
    def prior_sample(self, rows: int = PRIOR_SAMPLE_ROWS) -> torch.Tensor:
        """log y_hat (n, K) of at most so many rows, evenly spaced."""
        ids = evenly_spaced_rows(len(self.features), rows)
        if isinstance(self.prior, LinearPrior):
            return self.prior.at(unit_sample(self.features, ids))
        table = self.prior.log_probabilities
        return table[ids] if self.exchange is None else self.exchange.pick(table, ids)

    def load(self, settings: Settings) -> Inputs:
        """Read the features, for a support and for validation rows once more; all to the device."""
        device, parameters, held = settings.device, settings.parameters, settings.layout.held
        if self.exchange is None:
            features = Rows(self.features, "X", device, held=held)
        else:
            features = RankedRows(self.features, "X", device, self.exchange, held=held)
        prior = self.prior.to(device)
        zero_shot = prior if self.zero_shot is self.prior else self.zero_shot.to(device)
        support = validation = known = None
        if self.support is not None:
            labelled = self.support.to(device)
            rows, labels = labelled.features, labelled.labels
            support = Support.build(
                rows,
                labels,
                features,
                n_classes=prior.n_classes,
                n_neighbors=parameters.n_neighbors,
                clamp_similarity=parameters.clamp_similarity,
            )
            _warn_of_order("support", labels, prior, rows, features, support.nearest)
        if self.validation is not None:
            labelled = self.validation.to(device)
            rows, labels = labelled.features, labelled.labels
            queries = nearest_of_all(rows, features, 1)[0][:, 0]
            _warn_of_order("validation", labels, prior, rows, features, queries)
            validation = queries, labels
        if self.known is not None:
            known = KnownRows.of(self.known[features.own].to(device), features, prior.n_classes)
            rows = (self.known >= 0).nonzero()[:, 0]
            rows = rows[evenly_spaced_rows(len(rows), ORDER_SAMPLE_ROWS)]
            labels, rows = self.known[rows], rows.to(device)
            if not self.corrected:
                _warn_of_order("known", labels, prior, features[rows], features, rows)
        return Inputs(features, prior, zero_shot, support, validation, known)


@dataclass(frozen=True)
class Settings:
    """
    The parameters of a solve, with everything that they leave open resolved.

    Parameters
    ----------
    parameters : Parameters
        As the user set them.
    device : torch.device
    kl_weight : float
        lambda.
    layout : Layout
        The memory layout.
    truncation : Truncation or None
        Entries kept of a row; None where z is dense.
    backend : str
        Implementation of the operations.
    limit : int
        Bytes that the layout may take: what is free changes as soon as it is used.
    """

    parameters: Parameters
    device: torch.device
    kl_weight: float
    layout: Layout
    truncation: Truncation | None
    backend: str
    limit: int

    @classmethod
    def resolve(
        cls, parameters: Parameters, problem: Problem, ranks: int | None = None
    ) -> Settings:
        """
        Resolve the parameters that are None or "auto", for so many processes if it is a plan.

        Raises
        ------
        InputError
            A parameter out of range, a device or backend that is not there, or a problem that
            does not fit into memory.
        """
        parameters.check()
        parameters = parameters.plain()
        name = parameters.device
        if problem.exchange is not None:
            check_same(problem.exchange.ranks, problem.facts(parameters))
            name = problem.exchange.ranks.device(name)
        device = resolve_device(name)
        limit = problem.limit(parameters, device)
        layout = choose_layout(
            problem.size(parameters, device, ranks),
            device,
            form=parameters.form,
            candidates=parameters.candidates,
            rank=parameters.rank,
            memory=limit,
        )
        kl_weight = parameters.kl_weight
        if kl_weight is None:
            kl_weight = 1.0 if None in problem.gammas(parameters) else 0.5
        truncation = None
        if layout.candidates is not None:
            truncation = choose_truncation(
                kl_weight * problem.prior_sample(),
                len(problem.features),
                most=layout.candidates,
                candidates=parameters.candidates,
                rank=parameters.rank,
            )
        backend = choose_backend(parameters.backend, device, truncation)
        if backend == "triton" and problem.exchange is not None:
            raise InputError(
                "backend='triton' is for one process; processes that share the rows take "
                "backend='torch'"
            )
        if parameters.precision == "float16" and backend != "triton":
            raise InputError(
                f"precision='float16' is for backend='triton', here {backend} computes; leave "
                "precision out"
            )
        return cls(parameters, device, kl_weight, layout, truncation, backend, limit)

    def identity(self, gamma: float | None, graph_sha256: str) -> dict[str, Any]:
        """All that the result of a run depends on, except the arrays of the problem."""
        return _deciding(self.parameters) | {
            "kl_weight": self.kl_weight,
            "gamma": gamma,
            "truncation": self.truncation and asdict(self.truncation),
            "backend": self.backend,
            "device": self.device.type,
            "graph_sha256": graph_sha256,
        }


@dataclass(frozen=True)
class Inputs:
    """
    A problem on the device that solves it.

    Parameters
    ----------
    features : Rows (N, d)
        Unit rows.
    prior, zero_shot : Prior
    support : Support, optional
    validation : tuple of Tensor (V,), (V,), optional
        The most similar query of each validation row, and the labels.
    known : KnownRows, optional
    """

    features: Rows
    prior: Prior
    zero_shot: Prior
    support: Support | None = None
    validation: tuple[torch.Tensor, torch.Tensor] | None = None
    known: KnownRows | None = None


def _linear_prior(rows: torch.Tensor, name: str, logit_scale: float) -> LinearPrior:
    """The prior of text features or prototypes (K, d), with a warning if two are equal."""
    warn_of_equal_rows(rows, name)
    return LinearPrior.from_prototypes(rows, logit_scale)


def _deciding(parameters: Parameters) -> dict[str, Any]:
    """The parameters on which a result depends."""
    irrelevant = ("memory", "verbose")
    names = (field.name for field in fields(Parameters))
    return {name: getattr(parameters, name) for name in names if name not in irrelevant}


def _hash(array: torch.Tensor | LabelledRows | None) -> str:
    digest = hashlib.sha256()
    parts = (array.features, array.labels) if isinstance(array, LabelledRows) else (array,)
    for part in parts:
        if part is None:
            continue
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _warn_of_order(
    name: str,
    labels: torch.Tensor,
    prior: Prior,
    rows: torch.Tensor,
    features: Rows,
    queries: torch.Tensor,
) -> None:
    """Warn where labels (M,) contradict the prior of rows (M, d), or of their nearest queries."""
    if isinstance(prior, LinearPrior):
        zero_shot = prior.predict(rows)[0]
    else:
        zero_shot = features.pick(prior.log_probabilities, queries).argmax(1).cpu().numpy()
    for message in check_class_order(zero_shot, labels.cpu().numpy()):
        warnings.warn(f"{name}_labels: {message}", stacklevel=user_level())
