"""Run by torchrun: what ranks add up and choose on GPUs, against float32. Prints "right" once."""

import itertools
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from moec.kernels.launches.collectives import PREFILL_ROWS
from moec.kernels.torch import collectives
from moec.runtime.ranks.group import join

EPS = 1e-5


def everyone(x: Tensor) -> list[Tensor]:
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.contiguous())
    return found


def same(x: Tensor) -> bool:
    bits = everyone(x.view(torch.uint8))
    return all(torch.equal(bits[0], each) for each in bits)


def near(found: Tensor, expected: Tensor, limit: float) -> None:
    error = float((found.float() - expected).norm() / expected.norm())
    assert error <= limit, (error, limit)


def normed(total: Tensor, gain: Tensor) -> Tensor:
    root = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
    return (total * root).bfloat16().float() * gain.float()


def check(dim: int, tokens: int, mine: torch.Generator, shared: torch.Generator) -> None:
    part = torch.randn(tokens, dim, device="cuda", generator=mine).bfloat16()
    x = torch.randn(tokens, dim, device="cuda", generator=shared).bfloat16()
    gain = torch.randn(dim, device="cuda", generator=shared).bfloat16()
    parts = sum(each.float() for each in everyone(part))
    by_nccl = 1e-2  # NCCL adds up in bf16
    limit = 1e-6 if tokens <= 64 else by_nccl
    near(collectives.all_reduce(part.clone()), parts.bfloat16().float(), limit)
    total = (parts + x.float()).bfloat16().float()
    limit = 1e-6 if tokens <= PREFILL_ROWS else by_nccl
    own = slice(None)
    for whole in (True, False):
        if not whole and 64 < tokens <= PREFILL_ROWS:
            share = -(-tokens // dist.get_world_size())
            own = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
        kept, sums = collectives.all_reduce_norm(x, part.clone(), gain, EPS, whole)
        found = kept.clone()  # the next sum may write into it
        near(sums[own], total[own], limit)
        near(found, normed(total, gain), 1e-2)
        codes, scale, more = collectives.all_reduce_norm_fp8(x, part.clone(), gain, EPS, whole)
        near(codes.float() * scale[:, None], normed(total, gain), 4e-2)
        near(more[own], total[own], limit)
        assert same(found) and same(codes) and same(scale)
        assert not whole or (same(sums) and same(more) and torch.equal(kept, found))
    if tokens <= 64:
        wide = torch.randn(3, tokens, dim, device="cuda", generator=mine)
        what = collectives.Sum(add=True, norm=True, narrow=True, parts=3, eps=EPS)
        found = collectives._sum(what, wide, x, gain)["total"]
        all_ = sum(each.float() for each in everyone(wide.sum(0).bfloat16()))
        near(found, (all_ + x.float()).bfloat16().float(), 1e-3)


def tokens_of_all(rows: int, vocab: int, mine: torch.Generator) -> None:
    rank = dist.get_rank()
    part = torch.randn(rows, vocab, device="cuda", generator=mine).bfloat16()  # has ties
    whole = torch.cat(everyone(part), -1)
    found = collectives.likeliest_part(part, rank * vocab)
    assert torch.equal(whole.gather(-1, found[:, None])[:, 0], whole.max(-1).values)
    first = torch.stack([(row == row.max()).nonzero()[0, 0] for row in whole])
    assert rows > 64 or torch.equal(found, first)
    assert same(found)


def graphs(dim: int, mine: torch.Generator) -> None:
    """Replays of a CUDA graph, with one rank behind the others, are the calls by themselves."""
    part, x = (torch.randn(2, dim, device="cuda", generator=mine).bfloat16() for _ in range(2))
    dist.broadcast(x, 0)
    gain = torch.ones(dim, device="cuda").bfloat16()

    def step() -> Tensor:
        total = x
        for turn in range(5):  # a call that met another one would add other values
            rows = part[: 1 + turn % 2] * (turn + 1)
            total = total.clone()
            total[: len(rows)] = collectives.all_reduce_norm(
                total[: len(rows)], rows, gain, EPS, True
            )[1]
        return total

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for turn in range(20):
        if turn % dist.get_world_size() == dist.get_rank():
            torch.cuda._sleep(2_000_000)
        graph.replay()
        assert torch.equal(found, expected)


def main() -> None:
    rank = join("cuda")
    mine = torch.Generator("cuda").manual_seed(100 + rank.index)
    shared = torch.Generator("cuda").manual_seed(7)
    for dim in (5120, 1536, 640, 128):
        collectives.meet(dim, rank)
        for tokens in (1, 2, 7, 16, 64, 65, 301, PREFILL_ROWS, PREFILL_ROWS + 1):
            check(dim, tokens, mine, shared)
        graphs(dim, mine)
    for rows, vocab in itertools.product((1, 8, 64, 70), (101056, 2048, 96)):
        tokens_of_all(rows, vocab, mine)
    dist.barrier()
    if rank.index == 0:
        print("right")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
