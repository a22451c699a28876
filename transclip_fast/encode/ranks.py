"""Several processes that encode one source together, as `torchrun` starts them."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from transclip_fast.errors import InputError, one_line

MAX_WORKERS = 16  # decoding processes a rank starts by itself
TIMEOUT = timedelta(days=7)  # for slower ranks; gloo reports a rank that dies at once
MAX_MESSAGE_BYTES = 1 << 31  # places of 100 million rows; more is a stranger's
MAX_NUMBER = 65535  # of ports and ranks
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

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank: plain JSON, so no rank can run code in another."""
        return value if self.size == 1 else self._sent_from(0, value)

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, plain JSON, on every rank; waits for the slowest."""
        if self.size == 1:
            return [value]
        return [self._sent_from(rank, value) for rank in range(self.size)]

    def _sent_from(self, rank: int, value: Any) -> Any:
        """One rank's value, on every rank."""
        data = _as_bytes(value) if rank == self.rank else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(data)])
        with _lost_rank_as_input_error():
            torch.distributed.broadcast(size, rank)
            if not 0 < int(size) <= MAX_MESSAGE_BYTES:
                raise InputError(f"rank {rank} announces a message of {int(size):,} bytes")
            if rank != self.rank:
                data = torch.empty(int(size), dtype=torch.uint8)
            torch.distributed.broadcast(data, rank)
        with understood(f"rank {rank}"):
            return json.loads(data.numpy().tobytes())


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """
    Join the ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Ranks exchange small JSON messages over gloo; features go through the folder that all of them
    see. If MASTER_ADDR is this machine's loopback address, ranks listen there alone; the store of
    `torchrun` is not ours, and listens on all interfaces. InputError if the other ranks cannot be
    reached, or one of them ended early.
    """
    size = _number("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1
    if size <= 1:
        yield ALONE
        return
    with _lost_rank_as_input_error(), _loopback_store():
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def understood(sender: str) -> Iterator[None]:
    """Turn an error about what another rank sent into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{sender} sent what no rank of this version sends ({one_line(error)}); start all "
            "ranks anew, on a network that no one else reaches"
        ) from error


def _as_bytes(value: Any) -> torch.Tensor:
    """A value as JSON, bytes (n,) uint8; TypeError if it would not arrive as it is."""
    text = json.dumps(value, allow_nan=False)
    if json.loads(text) != value:
        raise TypeError("only plain JSON is sent: no tuples, no keys but strings")
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@contextmanager
def _loopback_store() -> Iterator[None]:
    """
    Have torch's store listen on loopback inside, if MASTER_ADDR is that and the store is ours.

    By itself it listens on all interfaces: here it gets a socket that is bound already, and
    `init_process_group` takes the store of this process that has the port.
    """
    address, port = _variable("MASTER_ADDR"), _number("MASTER_PORT")
    if not _is_loopback(address):
        yield
        return
    interfaces = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    for name in interfaces[:1]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if _number("RANK") or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        yield
        return
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        descriptor = listener.detach()  # the store closes it
    distributed: Any = torch.distributed
    store = distributed.TCPStore(
        address, port, is_master=True, multi_tenant=True, master_listen_fd=descriptor
    )
    yield
    del store


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:  # another name
        return False


def _variable(name: str) -> str:
    if not os.environ.get(name):
        raise InputError(f"WORLD_SIZE is set, but {name} is not; start the ranks with torchrun")
    return os.environ[name]


def _number(name: str) -> int:
    """A number that the environment gives each rank."""
    value = _variable(name)
    if not value.isdecimal() or int(value) > MAX_NUMBER:
        raise InputError(f"{name}={value}: expected a number up to {MAX_NUMBER}")
    return int(value)


@contextmanager
def _lost_rank_as_input_error() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"another rank ended early ({reason}); run again to continue") from error
