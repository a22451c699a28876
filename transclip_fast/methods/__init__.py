"""
The methods of the literature, each a file, with a `fit` like that of `transclip_fast.TransCLIP`.

`METHODS` has them by name; `Method` says what is the same. All read the features in blocks of
rows, keep dense (N, K) float32 arrays, and refuse a fit that does not fit into memory.
"""

from __future__ import annotations

from transclip_fast.errors import InputError
from transclip_fast.methods.base import Method
from transclip_fast.methods.bd_cspn import BDCSPN
from transclip_fast.methods.ecalp import ECALP
from transclip_fast.methods.em_dirichlet import EMDirichlet, HardEMDirichlet
from transclip_fast.methods.finetuning import TransductiveFinetuning
from transclip_fast.methods.laplacian_shot import LaplacianShot
from transclip_fast.methods.logistic_regression import LogisticRegression
from transclip_fast.methods.pt_map import PTMAP
from transclip_fast.methods.stata import StatA
from transclip_fast.methods.tim import TIM
from transclip_fast.methods.tim_gd import TIMGD, AlphaTIM
from transclip_fast.methods.zero_shot import ZeroShot
from transclip_fast.methods.zlap import ZLaP

__all__ = [
    "METHODS",
    "Method",
    "ZeroShot",
    "StatA",
    "LaplacianShot",
    "EMDirichlet",
    "HardEMDirichlet",
    "ZLaP",
    "ECALP",
    "BDCSPN",
    "TIM",
    "TIMGD",
    "AlphaTIM",
    "PTMAP",
    "LogisticRegression",
    "TransductiveFinetuning",
    "method_class",
]

METHODS: dict[str, type[Method]] = {  # those that take most passes last
    method.name: method
    for method in (
        ZeroShot,
        StatA,
        LaplacianShot,
        EMDirichlet,
        HardEMDirichlet,
        ZLaP,
        ECALP,
        BDCSPN,
        LogisticRegression,
        TransductiveFinetuning,
        PTMAP,
        TIM,
        AlphaTIM,
        TIMGD,
    )
}


def method_class(name: str) -> type[Method]:
    """
    The method of that name.

    Raises
    ------
    InputError
        There is none.
    """
    if name not in METHODS:
        raise InputError(f"method {name!r} is not known; choose one of {', '.join(METHODS)}")
    return METHODS[name]
