"""Sums over ranks of many tokens that leave the multiprocessors to other work.

The GPU's copy engines write a rank's partial sums into the memory of its peers, while its
multiprocessors go on with the products of other tokens. The kernel of the norm, which comes next,
adds up what has arrived. NCCL's kernels would take multiprocessors from persistent kernels, which
expect all of them.

Sums start and end in turns: `TURNS` buffers are enough. A rank can start sum n + TURNS only after
all ranks have started sum n + TURNS - 2, whose partial sums come after the result of sum n.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.kernels.launches.collectives import summed
from moec.kernels.torch import ops
from moec.kernels.torch.launch import run
from moec.spec.sharding import Rank

#: buffers that take turns
TURNS = 4
#: the most tokens of a sum; NCCL adds up longer ones
MOST = 4096


@dataclass(frozen=True, slots=True)
class Norm:
    """What follows a sum: the RMS norm of x plus the sum, times gain; quantised if `narrow`."""

    x: Tensor
    gain: Tensor
    eps: float
    narrow: bool


class _Room:
    """The buffers of one rank that its peers write into: bf16 [TURNS, ranks, MOST, dim]."""

    def __init__(self, rank: Rank, dim: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.shape = (TURNS, rank.count, MOST, dim)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.own = symmetric.empty(*self.shape, dtype=torch.bfloat16, device=self.device)
        group = dist.group.WORLD
        assert group is not None
        self.memory: Any = symmetric.rendezvous(self.own, group)
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.peers = [
            self.memory.get_buffer(index, self.shape, torch.bfloat16)
            for index in range(rank.count)
            if index != rank.index
        ]
        self.turn = 0


#: the buffers of this process, by the width of the model; None: peers cannot be reached
_ROOMS: dict[int, _Room | None] = {}


def start(rank: Rank, part: Tensor, norm: Norm | None = None) -> Callable[[], Any]:
    """Start to add up part, bf16 [tokens, dim], of all ranks; return what gives the result.

    The result is the sum; or with `norm` the values of `all_reduce_norm` or `all_reduce_norm_fp8`.
    All ranks start the same sums in the same order.
    """
    tokens, dim = part.shape
    if dim not in _ROOMS:
        _ROOMS[dim] = _room(rank, dim)
    room = _ROOMS[dim]
    if room is None or tokens > MOST:
        work: Any = dist.all_reduce(part, async_op=True)
        return lambda: _after(work, part, norm)
    turn = room.turn
    room.turn = (turn + 1) % TURNS
    room.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(room.stream):
        for peer in room.peers:
            peer[turn, rank.index, :tokens].copy_(part, non_blocking=True)
        room.memory.barrier(channel=turn)
    part.record_stream(room.stream)
    done = room.stream.record_event()

    def finish() -> Any:
        torch.cuda.current_stream().wait_event(done)
        return _summed(rank, part, room.own[turn], norm)

    return finish


def _room(rank: Rank, dim: int) -> _Room | None:
    try:
        found: _Room | None = _Room(rank, dim)
    except RuntimeError:  # what torch raises depends on why; `collectives.meet` has warned
        found = None
    missing = torch.tensor([int(found is None)], device="cuda")
    dist.all_reduce(missing)
    return None if int(missing) else found


def _after(work: Any, part: Tensor, norm: Norm | None) -> Any:
    work.wait()  # the GPU waits, not the host
    if norm is None:
        return part
    following = ops.skip_norm_fp8 if norm.narrow else ops.skip_norm
    return following(norm.x, part, norm.gain, norm.eps)


def _summed(rank: Rank, part: Tensor, arrived: Tensor, norm: Norm | None) -> Any:
    """The sum of `part` and of what has arrived from the others, [ranks, MOST, dim]."""
    tokens, dim = part.shape
    total = torch.empty_like(part)
    values: dict[str, Any] = {"x": part, "part": part, "arrived": arrived, "gain": part}
    values |= {"total": total, "normed": total, "codes": total, "scale": total}
    found: dict[str, Tensor] = {}
    if norm is not None:
        values |= {"x": norm.x, "gain": norm.gain}
        if norm.narrow:
            found = ops.codes_like(tokens, dim, part.device)
        else:
            found = {"normed": torch.empty_like(part)}
    eps, narrow = (norm.eps, norm.narrow) if norm else (None, False)
    run(summed(dim, tokens, MOST, eps, narrow, rank), values | found)
    return total if norm is None else (*found.values(), total)
