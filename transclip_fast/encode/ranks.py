"""Several processes that encode one source together, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed

from transclip_fast.errors import InputError

MAX_WORKERS = 16  # decoding processes a rank starts by itself
TIMEOUT = timedelta(days=7)  # for slower ranks; gloo reports a rank that dies at once
Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of the `size` that share the work."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the manifest and talks to the user."""
        return self.rank == 0

    def part(self, plan: Sequence[Item]) -> list[Item]:
        """This rank's items of a plan: every `size`-th, from its own number on."""
        return list(plan[self.rank :: self.size])

    def device(self, name: str) -> str:
        """The device of a name; each rank on a machine gets its own GPU."""
        if self.size > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return name

    def cores(self) -> int:
        """This rank's share of the machine's cores, at most `MAX_WORKERS`."""
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1
        return min(max((os.cpu_count() or 1) // ranks_here, 1), MAX_WORKERS)

    def broadcast(self, value: Item) -> Item:
        """The first rank's value, on every rank."""
        values = [value]
        if self.size > 1:
            with _lost_rank_as_input_error():
                torch.distributed.broadcast_object_list(values)
        return values[0]

    def all_gather(self, value: Item) -> list[Item]:
        """The values of all ranks, on every rank; waits for the slowest."""
        values = [value] * self.size
        if self.size > 1:
            with _lost_rank_as_input_error():
                torch.distributed.all_gather_object(values, value)
        return values


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """
    Join the ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Ranks exchange small objects over gloo; features go through the folder that all of them see.
    InputError if the other ranks cannot be reached, or one of them ended early.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    with _lost_rank_as_input_error():
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _lost_rank_as_input_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"another rank ended early ({reason}); run again to continue") from error
