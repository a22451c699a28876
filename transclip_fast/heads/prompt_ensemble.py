"""Prompt ensembles: one prototype a class from the texts of several templates."""

from __future__ import annotations

from transclip_fast.heads.base import PrototypeHead
from transclip_fast.heads.task import HeadTask


def fit(task: HeadTask) -> PrototypeHead:
    """
    The prototypes of `ensemble`, which `fit_head` has made already: `task.text`.

    Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language
    Supervision, section 3.1.4.
    """
    return PrototypeHead(text=task.text, logit_scale=task.logit_scale)
