"""Runs in a process with TRITON_INTERPRET=1: sums of ranks in prefill, all ranks in one process.

A rank's memory is an array of this process, so that the kernels of all ranks can write into it. All
ranks run the first kernel before any of them runs the second one, as a barrier would have it.
"""

import interpreter  # noqa: F401
import torch

from moec.graph_builder import ops
from moec.kernels.launches import collectives
from moec.kernels.launches.collectives import Sum
from moec.kernels.torch.launch import run
from moec.spec.sharding import Rank

EPS = 1e-5


def check(count: int, rows: int, dim: int, narrow: bool, whole: bool) -> None:
    ranks = [Rank(index, count) for index in range(count)]
    memory = [torch.zeros(collectives.shared_words(dim, rank), dtype=torch.int32) for rank in ranks]
    x, *parts = (torch.randn(rows, dim).bfloat16() for _ in range(count + 1))
    gain, totals = torch.randn(dim).bfloat16(), [torch.zeros_like(x) for _ in ranks]
    peers = torch.tensor([each.data_ptr() for each in memory])
    what = Sum(add=True, norm=True, narrow=narrow, eps=EPS)
    share = collectives.share_of(rows, ranks[0])
    for step in (0, 1):
        for rank in ranks:
            values = {"x": x, "part": parts[rank.index], "gain": gain, "total": totals[rank.index]}
            values = {name: each.view(torch.int32) for name, each in values.items()}
            launch = collectives.prefill_sum(dim, rows, what, rank, whole)[step]
            run(launch, values | {"peers": peers, "tokens": rows, "share": share})
    total = (x.float() + sum(each.float() for each in parts)).bfloat16()
    normed = ops.rms_norm.eager(total, gain, EPS)
    codes, scale = ops.encode.eager(normed)
    for rank, mine, found in zip(ranks, memory, totals, strict=True):
        own = slice(rank.index * share, (rank.index + 1) * share)
        assert torch.equal(found[own], total[own])
        assert not found[: own.start].any() and not found[own.stop :].any()
        size = collectives.shared_rows(rank) * (dim // 2)
        _, result, sums = mine[: 3 * size].view(3, size)
        if narrow:
            theirs = result.view(torch.uint8)[: rows * dim].view(rows, dim)
            assert (theirs != codes.view(torch.uint8)).float().mean() < 1e-3  # ties of E4M3
            torch.testing.assert_close(mine[3 * size :].view(torch.float32)[:rows], scale)
        else:
            theirs = result.view(torch.bfloat16)[: rows * dim].view(rows, dim)
            torch.testing.assert_close(theirs, normed)
        sums = sums.view(torch.bfloat16)[: rows * dim].view(rows, dim)
        assert torch.equal(sums, total if whole else torch.zeros_like(total))
        print("right")


def main() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    collectives.PREFILL_ROWS = 96  # the arrays are as large as the most rows
    for each in (2, 65, 128, True, True), (2, 96, 40, False, False), (4, 70, 128, True, False):
        check(*each)
    check(4, 65, 64, False, True)


if __name__ == "__main__":
    main()
