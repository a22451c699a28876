"""
An outer step as one CUDA graph: small problems spend their time in launches.

The first call computes as usual: kernels are compiled, and what is read once is read. The second is
recorded and replayed, the others are replays. A recording reads and writes the same memory every
time; where the step left new tensors in place of old ones, it ends with copies into the old ones.
So what the owner of the step holds is up to date after each call, and its memory is the graph's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Step = Callable[[], None]


def cuda_graph(step: Step) -> Step:
    """Record a step, which computes nothing; returns what computes it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Captured:
    """
    A step that is recorded when it is taken again.

    Parameters
    ----------
    step : callable
        Launches the same work each time and reads nothing back to the host.
    renewed : callable
        The tensors that the next step takes from this one.
    record : callable
        `cuda_graph`, or what does as much.
    """

    def __init__(
        self,
        step: Step,
        renewed: Callable[[], Sequence[torch.Tensor]],
        record: Callable[[Step], Step] = cuda_graph,
    ) -> None:
        self._step, self._renewed, self._record = step, renewed, record
        self._replay: Step | None = None
        self._warm = False

    def __call__(self) -> None:
        """Take the step."""
        if not self._warm:
            self._warm = True
            self._step()
            return
        if self._replay is None:
            self._replay = self._record(self._closed)
        self._replay()

    def _closed(self) -> None:
        """The step, which ends where it began."""
        before = self._renewed()
        self._step()
        for old, new in zip(before, self._renewed(), strict=True):
            if new is not old:
                old.copy_(new)
