"""Several processes that do one piece of work together, as `torchrun` starts them."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from transclip_fast.errors import InputError, one_line

MAX_WORKERS = 16  # decoding processes a rank starts by itself
JOINING = timedelta(minutes=10)  # for ranks that start later, or on another machine
TIMEOUT = timedelta(days=7)  # for slower ranks; gloo reports a rank that dies at once
MAX_MESSAGE_BYTES = 1 << 31  # places of 100 million rows; more is a stranger's
MAX_NUMBER = 65535  # of ports and ranks
# A rank that ends says so in two bytes; other ones are the number of a rank that is lost.
SAID_BYTES, DONE = 2, MAX_NUMBER
TOKEN_BYTES = 16
SAYING_SECONDS, LEARNING_SECONDS, TERM_SECONDS = 10, 10, 3
OWN_ERROR_SECONDS = 1
EXIT_CODE = 2  # as of an InputError
# A machine that is gone closes no connection: after 10 s of silence it is asked three times.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}
WATCHING = "transclip_fast/watching"  # where rank 0 awaits the others: a key of the store
IPV4_OF_INTERFACE = 0x8915  # Linux's SIOCGIFADDR
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

    @property
    def on_this_machine(self) -> int:
        """Ranks of this machine, as far as the environment tells."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    def cores(self) -> int:
        """This rank's share of the cores that its processes may use, at most `MAX_WORKERS`."""
        # A container or a job may have few of the machine's, which `cpu_count` all counts.
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        return min(max((allowed or os.cpu_count() or 1) // self.on_this_machine, 1), MAX_WORKERS)

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
        with lost_rank_as_input_error():
            torch.distributed.broadcast(size, rank)
            if not 0 < int(size) <= MAX_MESSAGE_BYTES:
                raise InputError(f"rank {rank} announces a message of {int(size):,} bytes")
            if rank != self.rank:
                data = torch.empty(int(size), dtype=torch.uint8)
            torch.distributed.broadcast(data, rank)
        with understood(f"rank {rank}"):
            return json.loads(data.numpy().tobytes())


ALONE = Ranks()  # a group of one process is another object


class LostRankError(InputError):
    """Another rank does not answer."""


def current_ranks() -> Ranks:
    """The processes of the group of torch.distributed; `ALONE` itself if none is initialised."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ALONE
    if "cpu:gloo" not in torch.distributed.get_backend_config():
        raise InputError(
            "process group: sends nothing between CPUs; initialise it with backend='gloo', or "
            "'cpu:gloo,cuda:nccl'"
        )
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


def check_same(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """InputError, on all ranks, unless all have the same facts, which have names."""
    found = ranks.all_gather(dict(facts))
    for rank, other in enumerate(found):
        for name in sorted(found[0].keys() | other.keys()):
            if other.get(name) != found[0].get(name):
                raise InputError(
                    f"{name}: rank {rank} has other ones than rank 0; start all ranks with the "
                    "same version, files and parameters"
                )


def started_ranks() -> int:
    """How many ranks the environment describes; 1 where this process was started by itself."""
    return _number("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1


@contextmanager
def joined(*, together: bool = False) -> Iterator[Ranks]:
    """
    Join the ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, or be of those that
    this process has joined.

    Ranks exchange small JSON messages over gloo; features go through the folder that all of them
    see. They listen where this machine reaches MASTER_ADDR, on its loopback address alone if it is
    that; the store of `torchrun` is not ours, and listens on all interfaces. InputError if not all
    ranks come within ten minutes, or one of them ended early when this one needs it; if they work
    `together`, all others then end at once, with one line that names it.
    """
    if (ranks := current_ranks()) is not ALONE:
        yield ranks
        return
    size = started_ranks()
    if size <= 1 and "MASTER_PORT" not in os.environ:
        yield ALONE
        return
    ranks, address = Ranks(_number("RANK"), size), _variable("MASTER_ADDR")
    if (interface := _interface_to(address)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    with _meeting(address, size):
        store = _met(ranks, address, _number("MASTER_PORT"))
        connections = _connected(ranks, address, store)
    with _watched(ranks, connections):
        with _meeting(address, size):
            torch.distributed.init_process_group(
                "gloo", store=store, rank=ranks.rank, world_size=size, timeout=TIMEOUT
            )
            torch.distributed.barrier()  # rank 0 may end at once, and its store with it
        if together:
            try:
                yield ranks
            except LostRankError:
                time.sleep(LEARNING_SECONDS)  # which one it was: that ends this process
                raise
    try:
        if not together:
            yield ranks
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
def _meeting(address: str, size: int) -> Iterator[None]:
    """Turn an error of ranks that cannot reach each other into an InputError."""
    try:
        yield
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise InputError(
            f"ranks: they do not meet at {address} ({one_line(error)}); start all {size} of them "
            "within ten minutes, where they reach each other (GLOO_SOCKET_IFNAME names the network)"
        ) from error


def _met(ranks: Ranks, address: str, port: int) -> Any:
    """
    The store of torch.distributed at an address, once all ranks have come to it.

    By itself it listens on all interfaces: on loopback, if it is ours, it gets a socket that is
    bound already.
    """
    distributed: Any = torch.distributed
    ours = ranks.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not (ours and _is_loopback(address)):
        return next(distributed.rendezvous("env://", timeout=JOINING))[0]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        descriptor = listener.detach()  # the store closes it
    return distributed.TCPStore(
        address, port, ranks.size, is_master=True, timeout=JOINING, master_listen_fd=descriptor
    )


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:  # another name
        return False


def _interface_to(address: str) -> str | None:
    """
    The network interface over which this machine reaches an address; None where that is unknown.

    By itself gloo takes that of the machine's name, which on many is an address of loopback.
    """
    names = [name for _, name in socket.if_nameindex()]
    if _is_loopback(address):
        return next((name for name in names if name.startswith("lo")), None)
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((address, 1))  # sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for name in names:
            request = struct.pack("256s", name.encode())
            with suppress(OSError):  # it has no such address
                if fcntl.ioctl(probe.fileno(), IPV4_OF_INTERFACE, request)[20:24] == own:
                    return name
    return None


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
def lost_rank_as_input_error() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise LostRankError(
            f"another rank ended early ({reason}); run again to continue"
        ) from error


@contextmanager
def _watched(ranks: Ranks, connections: dict[socket.socket, int]) -> Iterator[None]:
    """
    End this process with one line that names the rank, if another one ends before all are done.

    Every rank keeps a connection to rank 0, which the system closes when either ends; rank 0 tells
    the others who it was. A rank that fails inside closes it, too.
    """
    if ranks.size == 1:
        yield
        return
    with _sigterm_socket() as signals:
        watch = threading.Thread(target=_watch, args=(ranks, connections, signals), daemon=True)
        watch.start()
        try:
            yield
        except BaseException:
            for connection in connections:
                connection.close()
            raise
        for connection in connections:
            with suppress(OSError):
                connection.sendall(_said(DONE))


@contextmanager
def _sigterm_socket() -> Iterator[socket.socket]:
    """
    Have SIGTERM written to a socket, as its number, instead of ending the process.

    `torchrun` sends it when a rank is lost, perhaps before this one has heard who it was.
    """
    signals, writer = socket.socketpair()
    if threading.current_thread() is not threading.main_thread():  # no signal comes here
        yield signals
        return
    writer.setblocking(False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    fd = signal.set_wakeup_fd(writer.fileno())
    try:
        yield signals
    finally:
        signal.set_wakeup_fd(fd)
        signal.signal(signal.SIGTERM, before)


def _connected(ranks: Ranks, address: str, store: Any) -> dict[socket.socket, int]:
    """A connection to each rank that this one watches: all to rank 0, which the store tells of."""
    seconds, found = JOINING.total_seconds(), dict[socket.socket, int]()
    if not ranks.leads:
        port, token = json.loads(store.get(WATCHING))
        connection = socket.create_connection((address, port), seconds)
        connection.sendall(bytes.fromhex(token) + _said(ranks.rank))
        return {_kept_alive(connection): 0}
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    secret = secrets.token_bytes(TOKEN_BYTES)
    with socket.create_server((address, 0), family=family, backlog=ranks.size) as listener:
        listener.settimeout(seconds)
        store.set(WATCHING, json.dumps([listener.getsockname()[1], secret.hex()]))
        while len(found) < ranks.size - 1:
            connection = listener.accept()[0]
            connection.settimeout(SAYING_SECONDS)
            said = b""
            with suppress(OSError):
                said = connection.recv(TOKEN_BYTES + SAID_BYTES, socket.MSG_WAITALL)
            if secrets.compare_digest(said[:TOKEN_BYTES], secret):
                found[_kept_alive(connection)] = int.from_bytes(said[TOKEN_BYTES:], "big")
            else:
                connection.close()  # a stranger's
    return found


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # of Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _watch(ranks: Ranks, connections: dict[socket.socket, int], signals: socket.socket) -> None:
    """Wait until a rank is lost, or all are done; SIGTERM ends this process."""
    with selectors.DefaultSelector() as selector, suppress(ValueError, OSError):
        for other in (signals, *connections):
            selector.register(other, selectors.EVENT_READ)
        patience = None  # seconds
        while len(selector.get_map()) > 1:
            ready = selector.select(patience)
            for key, _ in ready:
                connection: Any = key.fileobj
                if connection is signals:
                    number = signals.recv(1)
                    if not number:  # this rank has closed it
                        return
                    if number[0] == signal.SIGTERM:
                        patience = TERM_SECONDS
                    continue
                try:
                    said = connection.recv(SAID_BYTES, socket.MSG_WAITALL)
                except OSError:
                    if connection.fileno() < 0:  # this rank has closed it
                        return
                    said = b""
                if said == _said(DONE):
                    selector.unregister(connection)
                else:
                    lost = int.from_bytes(said, "big") if said else connections[connection]
                    _end(ranks, connections, lost)
            if patience is not None and not ready:
                os._exit(128 + signal.SIGTERM)


def _said(number: int) -> bytes:
    return number.to_bytes(SAID_BYTES, "big")


def _end(ranks: Ranks, connections: dict[socket.socket, int], lost: int) -> None:
    """End this process because a rank is lost; rank 0 tells the others first."""
    if ranks.leads:
        for connection in connections:
            with suppress(OSError):
                connection.sendall(_said(lost))
    time.sleep(OWN_ERROR_SECONDS)  # this rank may be about to end with a better line
    line = f"error: rank {lost} ended early; run the same command again to continue\n"
    os.write(sys.stderr.fileno(), line.encode())
    os._exit(EXIT_CODE)  # other threads may compute for minutes, or wait for the lost rank
