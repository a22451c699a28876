"""Several processes that share the work, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from transclip_fast.errors import InputError

MOST_WORKERS = 16
PATIENCE = timedelta(days=7)  # of a rank for slower ones; one that dies is noticed at once
Part = TypeVar("Part")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work; alone where there is but one."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that keeps the manifest and talks to the user."""
        return self.rank == 0

    def part(self, plan: Sequence[Part]) -> list[Part]:
        """What of a plan this rank does: every `size`-th, from its own number on."""
        return list(plan[self.rank :: self.size])

    def device(self, name: str) -> str:
        """The device of a name; of the GPUs of a machine each rank has its own."""
        if self.size > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return name

    def cores(self) -> int:
        """Cores of this machine that are this rank's, up to `MOST_WORKERS`."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1
        return min(max((os.cpu_count() or 1) // here, 1), MOST_WORKERS)

    def told(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        values = [value]
        if self.size > 1:
            with _lost():
                torch.distributed.broadcast_object_list(values)
        return values[0]

    def gathered(self, value: Part) -> list[Part]:
        """The values of all ranks, when all have come to give them."""
        values = [value] * self.size
        if self.size > 1:
            with _lost():
                torch.distributed.all_gather_object(values, value)
        return values


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """
    The ranks that the environment tells of (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    They exchange small objects over gloo; features go through the folder that all of them see.

    Raises
    ------
    InputError
        The others are not reached, or one of them ended early.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    with _lost():
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"another rank ended early ({reason}); run again to continue") from error
