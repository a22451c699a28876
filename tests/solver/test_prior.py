"""The prior where rows and prototypes are on different devices."""

from __future__ import annotations

import torch

from transclip_fast.solver.prior import LinearPrior


def test_rows_come_to_the_device_of_the_prototypes():
    prior = LinearPrior(torch.empty(3, 4, device="meta"))
    found = prior.at(torch.ones(2, 4))
    assert (found.device.type, found.shape) == ("meta", (2, 3))
