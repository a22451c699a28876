"""What identifies the runs of a protocol."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from transclip_fast.protocols.plans import TRANSCLIP_FS, Trials, few_shot


def test_runs_of_heads_without_patches_do_not_depend_on_them(pets):
    """Those that are done stay so once another head takes patches."""
    sizes = {"": 77, "support_": 60, "validation_": 30}
    patches = {f"{use}local_features": np.ones((n, 2, 33)) for use, n in sizes.items()}
    path = pets(**patches)

    def inputs(*heads):
        prompting = SimpleNamespace(class_names=["a"], identity={})
        trials = Trials(heads, [2], 1, "cpu", lambda data, head: prompting)
        return {run.columns["head"]: run.inputs["data"] for run in few_shot([path], trials)}

    alone = inputs("taskres", TRANSCLIP_FS)
    beside = inputs("taskres", "plot", TRANSCLIP_FS)
    assert {name: beside[name] for name in alone} == alone
    assert beside["plot"].keys() - alone["taskres"].keys() == patches.keys()
