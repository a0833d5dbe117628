"""Sockets between ranks on one host, over which they exchange bytes that lie on the host.

The program that starts the ranks makes a pair of sockets for each pair of ranks, and each rank
inherits its own ends. Nothing listens, so no other process can take part. gloo, which ranks under
torchrun use, listens on the network and takes whoever connects first.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from multiprocessing import BufferTooShort
from multiprocessing.connection import Connection, Pipe

import torch
from torch import Tensor

from moec.graph_builder.ops.fused import collectives
from moec.spec.sharding import Rank

#: the environment variable with a rank's ends: the numbers of their files, by rank, but for its own
SOCKETS = "MOEC_RANKS_SOCKETS"


@contextmanager
def pairs(count: int) -> Iterator[list[list[int]]]:
    """The files of `count` ranks' ends, for each rank in the order of the others.

    The ends are open in the block, in which the ranks have to be started.
    """
    with ExitStack() as stack:
        ends: list[list[int]] = [[] for _ in range(count)]
        for one, other in combinations(range(count), 2):
            for index, end in zip((one, other), Pipe(), strict=True):
                ends[index].append(stack.enter_context(end).fileno())
        yield ends


def connect(rank: Rank) -> bool:
    """Let this rank's ops exchange what lies on the host through its sockets, if it has any."""
    said = os.environ.pop(SOCKETS, "")
    if said:
        others = (index for index in range(rank.count) if index != rank.index)
        numbers = list(map(int, said.split(",")))
        for number in numbers:  # a process that keeps an end open would hide that this one ended
            os.set_inheritable(number, False)
        peers = {index: Connection(number) for index, number in zip(others, numbers, strict=True)}
        collectives.exchange = lambda sent: _exchange(sent, rank, peers)
    return collectives.exchange is not collectives.by_torch


def _exchange(sent: Tensor, rank: Rank, peers: dict[int, Connection]) -> list[Tensor]:
    """The bytes `sent` of all ranks, which have one shape.

    Two ranks meet at a time, and of each two the first one sends first. All ranks go through the
    pairs in one order, so that none waits for one that waits for it.

    Raises:
        ConnectionError: a rank has ended.
        RuntimeError: a rank sent another number of bytes.
    """
    found = []
    for index in range(rank.count):
        if index == rank.index:
            found.append(sent.clone())
            continue
        peer, room = peers[index], torch.empty_like(sent)
        try:
            if rank.index < index:
                peer.send_bytes(sent.flatten().numpy().data)
            size = peer.recv_bytes_into(room.flatten().numpy().data)
            if rank.index > index:
                peer.send_bytes(sent.flatten().numpy().data)
        except BufferTooShort as error:
            size = len(error.args[0])
        except (EOFError, OSError) as error:
            raise ConnectionError(f"rank {index} no longer answers") from error
        if size != sent.numel():
            raise RuntimeError(f"rank {index} sent {size} bytes, not {sent.numel()}")
        found.append(room)
    return found
