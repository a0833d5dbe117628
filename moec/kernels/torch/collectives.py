"""What ranks compute together, on CUDA, by our kernels and by NCCL.

`meet` is called once in each rank, by all together. It makes buffers that every rank's GPU can
write into (torch's symmetric memory). Where GPUs cannot reach each other's memory, NCCL adds up all
sums. It also adds up more rows than a prefill chunk has, and those that no norm follows.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moec.graph_builder.ops.fused import collectives as shared
from moec.graph_builder.ops.operands import MoeLayer
from moec.graph_builder.ops.registry import implement
from moec.kernels.launches import collectives
from moec.kernels.launches.collectives import WORLDS, Sum
from moec.kernels.sizes import MOST_TOKENS
from moec.kernels.torch import ops
from moec.kernels.torch.launch import overlaps, run
from moec.spec.sharding import Rank


class PeerMemory(NamedTuple):
    """Memory of this rank that its peers write into, and that of all of them.

    own      what the peers write
    peers    int64 [ranks]: the addresses of all ranks' memory
    handle   torch's record of that memory, which has a barrier
    """

    own: Tensor
    peers: Tensor
    handle: Any


@dataclass(frozen=True, slots=True)
class PeerBuffers:
    """What this rank shares with its peers; None: they cannot be reached.

    few      int64 [2, ranks, `MOST_TOKENS`, width], for few tokens
    calls    int32 [`MOST_TOKENS`]: the calls so far that had such a row
    many     for prefill, as `moec.kernels.peers.prefill` says
    """

    rank: Rank
    few: PeerMemory | None
    calls: Tensor
    many: PeerMemory | None = None


#: the buffers of this process, by the width of what is added up; `_BEST`: of the likeliest tokens
_BUFFERS: dict[int, PeerBuffers] = {}
_BEST = 0
#: whether ops skip what ranks do together, as in `alone`
_alone = False


def meet(dim: int, rank: Rank) -> None:
    """Make the buffers for sums of rows of `dim`, and let the ops of this process use them.

    All ranks call this at the same time.
    """
    for function in (
        embedding_part,
        all_reduce,
        all_reduce_norm,
        all_reduce_norm_fp8,
        moe_all_reduce_norm_fp8,
        all_gather,
        likeliest_part,
    ):
        if not _BUFFERS:
            implement(function.__name__, function, "CUDA")
    for key, words in ((dim, dim // 2), (_BEST, 2)):
        if key not in _BUFFERS:
            few = _shared(2 * rank.count * MOST_TOKENS * words, torch.int64, rank)
            many = None
            if key != _BEST and few:
                many = _shared(collectives.shared_words(dim, rank), torch.int32, rank)
            calls = torch.zeros(MOST_TOKENS, dtype=torch.int32, device="cuda")
            _BUFFERS[key] = PeerBuffers(rank, few, calls, many)
            if key == dim and rank.index == 0 and not (few and many):
                what = f"sums of more than {MOST_TOKENS} tokens" if few else "all sums"
                warnings.warn(f"{rank.count} GPUs: {what} go through NCCL", stacklevel=2)


def _shared(size: int, dtype: torch.dtype, rank: Rank) -> PeerMemory | None:
    """Memory of `size` elements that all peers can write into, filled with zeros.

    All ranks get None where one of them cannot have it. Torch says why in many ways.
    """
    if rank.count not in WORLDS:
        return None
    import torch.distributed._symmetric_memory as symmetric

    device, group = torch.device("cuda", torch.cuda.current_device()), dist.group.WORLD
    assert group is not None
    own, handle = None, None
    torch.cuda.empty_cache()  # this memory is not taken from torch's cache
    with suppress(RuntimeError):
        own = symmetric.empty(size, dtype=dtype, device=device)
    if not _all_have(own) or own is None:  # nobody waits for a rank that has no memory
        return None
    with suppress(RuntimeError):
        handle = symmetric.rendezvous(own, group)
    if not _all_have(handle) or handle is None:
        return None
    own.zero_()
    torch.cuda.synchronize()
    dist.barrier()  # nobody writes into a rank's memory before it has filled that with zeros
    peers = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)
    return PeerMemory(own, peers, handle)


def _all_have(what: object) -> bool:
    lacking = torch.tensor([int(what is None)], device="cuda")
    dist.all_reduce(lacking)
    return not int(lacking)


@contextmanager
def alone() -> Iterator[None]:
    """Let the ops of a block skip all that ranks do together; their results are of no use.

    A rank that captures a CUDA graph runs its calls once before. The other ranks may do so in
    another step, since that depends on the addresses of caches: nobody would answer.
    """
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def all_reduce(part: Tensor) -> Tensor:
    return _sum(Sum(), part)["total"]


def all_reduce_norm(
    x: Tensor, part: Tensor, weight: Tensor, eps: float, whole: bool
) -> tuple[Tensor, Tensor]:
    values = _sum(Sum(add=True, norm=True, eps=eps), part, x, weight, whole)
    return values["normed"], values["total"]


def all_reduce_norm_fp8(
    x: Tensor, part: Tensor, weight: Tensor, eps: float, whole: bool
) -> tuple[Tensor, Tensor, Tensor]:
    values = _sum(Sum(add=True, norm=True, narrow=True, eps=eps), part, x, weight, whole)
    return values["codes"], values["scale"], values["total"]


def moe_all_reduce_norm_fp8(
    total: Tensor, normed: Tensor, eps: float, whole: bool, *layer_and_after: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    *layer, after = layer_and_after
    if not _is_direct(normed):
        return all_reduce_norm_fp8(total, ops.moe_layer(normed, *layer), after, eps, whole)
    parts = ops.moe_parts(MoeLayer(normed, *layer))
    what = Sum(add=True, norm=True, narrow=True, parts=len(parts), eps=eps)
    values = _sum(what, parts, total, after)
    return values["codes"], values["scale"], values["total"]


def embedding_part(ids: Tensor, table: Tensor, first: int, dtype: str) -> Tensor:
    """The table and the result are bf16, the only dtype in which target torch computes."""
    out = torch.empty(ids.numel(), table.shape[1], dtype=table.dtype, device=table.device)
    vocab, dim = table.shape
    launch = collectives.embedding_part(vocab, dim, ids.numel())
    run(launch, {"ids": ids.contiguous(), "table": table, "out": out, "first": first})
    return out


def all_gather(part: Tensor, sizes: Sequence[int]) -> Tensor:
    widest = max(sizes)
    room = part.contiguous()
    if part.shape[-1] < widest:
        room = torch.nn.functional.pad(part, (0, widest - part.shape[-1]))
    found = room.new_empty(len(sizes), *room.shape)
    if not _alone:
        dist.all_gather_into_tensor(found, room)
    return torch.cat([each[..., :size] for each, size in zip(found, sizes, strict=True)], -1)


def likeliest_part(part: Tensor, first: int) -> Tensor:
    rows, vocab = part.shape
    if _alone:
        return part.argmax(-1)
    buffers = _BUFFERS[_BEST]
    if rows > MOST_TOKENS or buffers.few is None:
        found: Tensor = shared.likeliest_part.eager(part, first)
        return found
    blocks = collectives.blocks_of(vocab)
    device = part.device
    values: dict[str, Any] = {
        "logits": part,
        "values": torch.empty(rows, blocks, dtype=torch.float32, device=device),
        "tokens_in": torch.empty(rows, blocks, dtype=torch.int32, device=device),
        "out": torch.empty(rows, dtype=torch.int64, device=device),
        "calls": buffers.calls,
        "peers": buffers.few.peers,
    }
    for launch in collectives.likeliest(rows, vocab, first, buffers.rank):
        run(launch, values)
    best: Tensor = values["out"]
    return best


def _is_direct(x: Tensor) -> bool:
    """Whether our kernel adds up rows like those of `x`."""
    return len(x) <= MOST_TOKENS and _BUFFERS[x.shape[-1]].few is not None


def _sum(
    what: Sum,
    part: Tensor,
    x: Tensor | None = None,
    gain: Tensor | None = None,
    whole: bool = True,
) -> dict[str, Tensor]:
    """The sum over ranks of part, bf16 [tokens, dim] or float32 [parts, tokens, dim].

    In prefill, unless `whole`, a rank has its own rows of the sum alone, and the results last until
    the next sum.
    """
    tokens, dim = part.shape[-2:]
    buffers = _BUFFERS[dim]
    many = None if _alone or tokens > collectives.PREFILL_ROWS else buffers.many
    if tokens > MOST_TOKENS and many and x is not None and gain is not None:
        return _in_prefill(what, part, x, gain, whole, buffers.rank, many)
    if _alone or tokens > MOST_TOKENS or buffers.few is None:
        return _by_nccl(what, part, x, gain)
    device, made = part.device, torch.bfloat16
    found: dict[str, Tensor] = {"total": torch.empty(tokens, dim, dtype=made, device=device)}
    if what.norm and what.narrow:
        found |= ops.codes_like(tokens, dim, device)
    elif what.norm:
        found["normed"] = torch.empty_like(found["total"])
    values: dict[str, Any] = {
        "x": part if x is None else x,
        "part": part.view(torch.int32 if what.parts == 1 else torch.int64),
        "gain": part if gain is None else gain,
        "normed": part,
        "codes": part,
        "scale": part,
        "calls": buffers.calls,
        "peers": buffers.few.peers,
        "tokens": tokens,
    } | found
    for name in ("x", "gain", "total", "normed"):
        values[name] = values[name].view(torch.int32)
    run(collectives.all_reduce(dim, tokens, what, buffers.rank, overlaps(device)), values)
    return found


def _in_prefill(
    what: Sum, part: Tensor, x: Tensor, gain: Tensor, whole: bool, rank: Rank, memory: PeerMemory
) -> dict[str, Tensor]:
    """What `_sum` gives, for the rows of a prefill chunk, bf16."""
    rows, dim = part.shape
    total = torch.empty_like(part)
    values = {
        "x": x.view(torch.int32),
        "part": part.view(torch.int32),
        "gain": gain.view(torch.int32),
        "total": total.view(torch.int32),
        "peers": memory.peers,
        "tokens": rows,
        "share": collectives.share_of(rows, rank),
    }
    for launch in collectives.prefill_sum(dim, rows, what, rank, whole):
        run(launch, values)
        memory.handle.barrier(channel=0)
    size = collectives.shared_rows(rank) * (dim // 2)
    _, result, totals = memory.own[: 3 * size].view(3, size)
    found = {"total": total}
    if whole:
        found["total"] = totals.view(torch.bfloat16)[: rows * dim].view(rows, dim)
    if what.narrow:
        found["codes"] = result.view(torch.float8_e4m3fn)[: rows * dim].view(rows, dim)
        found["scale"] = memory.own[3 * size :].view(torch.float32)[:rows]
    else:
        found["normed"] = result.view(torch.bfloat16)[: rows * dim].view(rows, dim)
    return {name: each.clone() for name, each in found.items()} if whole else found


def _by_nccl(what: Sum, part: Tensor, x: Tensor | None, gain: Tensor | None) -> dict[str, Tensor]:
    """What `_sum` gives; the ranks' sums are bf16, and so is their sum.

    It takes the place of `part`, which no other op uses.
    """
    whole = part.sum(0).bfloat16() if what.parts > 1 else part
    if not _alone:
        dist.all_reduce(whole)
    if x is None or gain is None:
        return {"total": whole}
    if what.narrow:
        codes, scale, total = ops.skip_norm_fp8(x, whole, gain, what.eps)
        return {"codes": codes, "scale": scale, "total": total}
    normed, total = ops.skip_norm(x, whole, gain, what.eps)
    return {"normed": normed, "total": total}
