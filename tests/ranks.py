"""Processes of a group of torch.distributed, for tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
import warnings
from multiprocessing.connection import wait

import torch

SECONDS = 60  # that ranks may take


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def become(rank, size, port):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def on_ranks(size, task, *arguments):
    """What `task(*arguments)` returns on each of `size` ranks; None of one killed."""
    port, context = free_port(), multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        context.Process(target=_rank, args=(rank, size, port, pipe[1], task, arguments))
        for rank, pipe in enumerate(pipes)
    ]
    with warnings.catch_warnings():  # of Python 3.12, that torch's threads are not forked
        warnings.simplefilter("ignore")
        for rank in ranks:
            rank.start()
    for _, ours in pipes:
        ours.close()
    found, waiting = {}, {pipe: rank for rank, (pipe, _) in enumerate(pipes)}
    while len(found) < size and (ready := wait(waiting.keys() - found.keys(), SECONDS)):
        for pipe in ready:
            try:
                found[pipe] = pipe.recv()
            except EOFError:
                found[pipe] = None  # it was killed
    for rank in ranks:
        rank.kill()
        rank.join()
    for error in found.values():
        if isinstance(error, Exception):
            raise error
    return [found[pipe] for pipe in waiting]


def _rank(rank, size, port, pipe, task, arguments):
    become(rank, size, port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    try:
        pipe.send(task(*arguments))
    except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
        traceback.print_exc()
        pipe.send(error)
    pipe.close()
    os._exit(0)  # closes the connections at once, as the end of a program does
