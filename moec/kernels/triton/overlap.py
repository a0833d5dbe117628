"""Programmatic dependent launch: a kernel starts while the ones before it still run (sm_90 on).

A kernel says `next_may_start` early, and `wait`s before it touches what others have written. What
nobody writes it may read before that.

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
