"""Programmatic dependent launch (sm_90 and later): a kernel starts before the previous one ends.

A kernel calls `next_may_start` early, and `wait` before it touches anything that earlier kernels
write. It may read what no kernel writes, such as weights, before it waits.

`wait` returns when the previous kernel has ended. That kernel has waited too, so all kernels before
it have ended as well. A kernel without a `wait` would break this for the kernels after it.
"""

import triton
import triton.language as tl


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Wait until everything that earlier launches have written is visible."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def next_may_start(OVERLAP: tl.constexpr):
    """Let the next launch start, once all programs of this one have called this."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
