"""The ranks that share a model, in one rank.

torchrun starts ranks, and so does `moec.runtime.ranks.start`. Both say in environment variables
which rank a process is, and where all of them meet. All ranks run the same calls in the same order:
each computes its part, and all of them get the whole result.

GPUs meet through NCCL. What lies on the host goes through sockets that only the ranks have, or
under torchrun through gloo. Nothing that comes from another rank is unpickled: that would run code.
"""

import atexit
import json
import os
import secrets
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moec.exporters.versions import versions
from moec.graph_builder.ops.fused.collectives import gathered
from moec.runtime.engines.engine import Run
from moec.runtime.engines.gpu import check_device
from moec.runtime.ranks.sockets import connect
from moec.spec.errors import MoecError, refuse
from moec.spec.model import TextSpec
from moec.spec.sharding import ALONE, Rank, span

T = TypeVar("T")
#: the environment variables that make a process a rank; the last is a file where ranks meet
RANK, WORLD, LOCAL, STORE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MOEC_RANKS_STORE"
#: how long a rank waits for the others: longer than a user thinks. Whoever started the ranks ends
#: them when one dies.
PATIENCE = timedelta(days=1)


def started_as() -> Rank:
    """The rank as which this process was started; alone without the environment variables."""
    said = [os.environ.get(name, "") for name in (RANK, WORLD)]
    if "" in said:
        return ALONE
    if not all(each.isdecimal() for each in said) or int(said[0]) >= int(said[1]):
        found = " ".join(f"{name}={each}" for name, each in zip((RANK, WORLD), said, strict=True))
        refuse("environment", found, "a rank, and how many there are", "start it by torchrun")
    return Rank(int(said[0]), int(said[1]))


def join(device: str) -> Rank:
    """Meet the other ranks, if this process is a rank, and take the rank's GPU.

    A group of torch that this program has joined already is used as it is.

    Raises:
        MoecError: there are fewer GPUs than ranks, or the group has another number of ranks (exit
            code 3).
    """
    rank = started_as()
    if rank.count == 1:
        return rank
    own: torch.device | None = None
    if device == "cuda":
        check_device(device, f"rank {rank.index} of {rank.count}")
        found, local = torch.cuda.device_count(), int(os.environ.get(LOCAL, rank.index))
        if local >= found:
            refuse(
                f"rank {rank.index} of {rank.count}",
                f"{found} {'GPU' if found == 1 else 'GPUs'} on this host",
                "a GPU for each rank",
                f"use --gpus {found}",
                exit_code=3,
            )
        torch.cuda.set_device(local)
        own = torch.device("cuda", local)
    by_sockets = connect(rank)
    if (own is not None or not by_sockets) and not dist.is_initialized():
        _join_torchs_group(rank, own, by_sockets)
    if dist.is_initialized() and dist.get_world_size() != rank.count:
        refuse(
            "torch's process group",
            f"{dist.get_world_size()} ranks",
            str(rank.count),
            f"start {rank.count} ranks",
            exit_code=3,
        )
    return rank


def _join_torchs_group(rank: Rank, own: torch.device | None, by_sockets: bool) -> None:
    """Join the group of NCCL for the GPU `own`, and that of gloo without sockets."""
    place = os.environ.get(STORE)
    if place is None and "MASTER_ADDR" not in os.environ:
        missing = f"{RANK} and {WORLD}, and no MASTER_ADDR where ranks meet"
        refuse("environment", missing, "what torchrun sets", f"unset {RANK} {WORLD}, or torchrun")
    local = os.environ.get("LOCAL_WORLD_SIZE", str(rank.count))
    if local != str(rank.count):
        found, expected = f"{local} of {rank.count} ranks on this host", "all ranks on one host"
        refuse("environment: LOCAL_WORLD_SIZE", found, expected, "docs/deploy.md: engines for more")
    if Path("/sys/class/net/lo").exists():  # one host: gloo listens on no other network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    by_gloo = "gloo" if own is None else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        "nccl" if by_sockets else by_gloo,
        init_method=None if place else "env://",
        store=dist.FileStore(place, rank.count)  # type: ignore[attr-defined]
        if place
        else None,
        rank=rank.index,
        world_size=rank.count,
        timeout=PATIENCE,
        device_id=own,
    )
    if own is None:
        # A rank that ends with an open group may abort when another one has gone. NCCL would wait
        # for CUDA graphs that use it, and needs no end.
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def agree(what: str, digest: str) -> None:
    """Refuse ranks that have opened different things.

    Args:
        what: what they open, for the message.
        digest: what must be the same on all of them.

    Raises:
        MoecError: versions or digests differ. All ranks raise it.
    """
    found: list[dict[str, str]] = _gathered_json(versions() | {what: digest})
    for index, theirs in enumerate(found):
        differs = [name for name in theirs if theirs.get(name) != found[0].get(name)]
        differs += [name for name in found[0] if name not in theirs]
        if differs:
            name = differs[0]
            refuse(
                f"rank {index}: {name}",
                theirs.get(name, "nothing"),
                f"{found[0].get(name, 'nothing')}, as rank 0 has",
                "start all ranks on the same artefact, with the same versions",
            )


def same(value: T) -> T:
    """The `value` that rank 0 has, in all ranks, which have joined by then.

    The value is what JSON can say: text or a number, such as a seed.
    """
    if started_as().count == 1:
        return value
    first: T = _gathered_json(value)[0]
    return first


def _gathered_json(value: object) -> list[Any]:
    """What every rank says, as JSON."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [int(each) for each in gathered(torch.tensor([len(text)]))]
    room = torch.zeros(max(sizes), dtype=torch.uint8)
    room[: len(text)] = text
    found = zip(gathered(room), sizes, strict=True)
    return [json.loads(each[:size].numpy().tobytes()) for each, size in found]


def same_seed(seed: int | None, rank: Rank) -> int | None:
    """A seed with which all ranks draw the same; `seed` itself in a process alone."""
    if rank.count == 1:
        return seed
    return same(secrets.randbits(62) if seed is None else seed)


def all_heads(cache: torch.Tensor, text: TextSpec) -> torch.Tensor:
    """A cache [B, heads, N, d] of all key/value heads, from the part that this rank has."""
    count, size = started_as().count, text.head_dim
    spans = [span(text, "kv_heads", Rank(index, count)) for index in range(count)]
    room = cache.new_zeros(len(cache), max(b - a for a, b in spans) // size, *cache.shape[2:])
    room[:, : cache.shape[1]] = cache
    whole = torch.empty(len(cache), text.kv_heads, *cache.shape[2:], dtype=cache.dtype)
    for part, (start, stop) in zip(gathered(room.cpu()), spans, strict=True):
        whole[:, start // size : stop // size] = part[:, : (stop - start) // size]
    return whole


class LostError(MoecError):
    """An engine's call failed in a rank: other ranks may have got further, or wait for it."""


#: engine calls that this rank has made
calls = 0


def counted(run: Run) -> Run:
    """`run`, whose calls are counted, and whose refusals are a `LostError`."""

    def shared(feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        global calls
        try:
            return run(feeds)
        except MoecError as error:
            parts = error.where, error.found, error.expected, error.next_step
            raise LostError(*parts, error.exit_code) from error
        finally:
            calls += 1

    return shared


def from_first(run: Run) -> Run:
    """`run`, whose results are those of rank 0 on all ranks, to the bit."""

    def shared(feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = run(feeds)
        for name, each in found.items():
            if each.is_cuda:
                dist.broadcast(each, 0)
            else:
                found[name] = gathered(each)[0]
        return found

    return shared
