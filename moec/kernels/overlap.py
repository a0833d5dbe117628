"""Programmatic dependent launch: a kernel starts while the ones before it still run (sm_90 on).

A kernel says `next_may_start` early, and `wait`s before it touches what others have written. What
is nobody's, the weights, it may ask for before that: while a small kernel has the GPU to itself,
the memory already brings the next one's weights to L2.

`wait` returns when the kernel before has ended, which itself has waited: so all before have ended.
A kernel that skips `wait` breaks that for those after it.
"""

import triton
import triton.language as tl


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until what the launches before have written can be seen."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def next_may_start(OVERLAP: tl.constexpr):
    """The launch after this may start, once all programs of this one have said so."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch_ahead(rows, BYTES: tl.constexpr):
    """Ask for BYTES from each of the addresses `rows`, a multiple of 16, to be brought to L2."""
    if BYTES > 0:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
            "=r,l,r",
            [rows, tl.full(rows.shape, BYTES, tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
