"""Check and time the FP8 linear layer and the attention of many tokens on a GPU, beside torch's.

    python benchmarks/many_tokens.py [--only linear|attention|hopper]

Every cut of a kernel is first checked on fresh random operands, in float64 or float32: rows of
different length, continued sequences, and slots after the newest that hold NaN. Three runs must
agree to the bit. A cut that is wrong is said to be, is not timed, and makes the exit code 1.

The sizes are Scout's: the products of q, k and v and of the output, 40 heads of 128 that share 8
keys and values. Times are medians of CUDA graph replays. "torch" is `torch._scaled_mm` with fast
accumulation, and flash attention and cuDNN's by `scaled_dot_product_attention`. Rates count the
products that the results need.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moe_kernels import microseconds, need_gpu
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

HEADS = (40, 8, 128)
#: name, width, dim, tokens
PRODUCTS = tuple(
    (name, width, 5120, tokens)
    for tokens in (1024, 8192)
    for name, width in (("qkv", 7168), ("o", 5120))
)
#: tokens, slots
ATTENDED = ((1024, 1024), (8192, 8192), (2048, 8192))
#: width, dim, tokens to check, besides those of the tests
CHECKED_PRODUCTS = ((7168, 5120, 1000), (5120, 5120, 65), (5120, 8192, 300), (7168, 5120, 129))
#: heads, key/value heads, size, tokens, slots, the newest slot of each row
CHECKED_ATTENTION = (
    (*HEADS, 300, 1500, (299, 425, 426, 1234)),
    (*HEADS, 1024, 1024, (1023,)),
    (*HEADS, 129, 4000, (3999, 128)),
    (*HEADS, 200, 400, (99, 399)),  # half the tokens of the first row have no slot
)


def line(*cells: str) -> None:
    print("  ".join(f"{each:<26}" for each in cells).rstrip(), flush=True)


def timed(call: Callable[[], object], operations: float) -> str:
    took = microseconds(lambda _: call(), [None] * 8, 9)
    return f"{took:8.1f} us {operations / took / 1e6:6.0f} TFLOP/s"


class Table:
    """The rows of one kernel: each is checked, then timed; wrong ones are counted."""

    def __init__(self) -> None:
        self.failed = 0

    def row(self, name: str, check: Callable[[], str], times: Callable[[], Iterator[str]]) -> None:
        """Print what is wrong, or else the times."""
        try:
            reason = check()
            cells = [f"WRONG: {reason}"] if reason else list(times())
        except Exception as error:  # the other rows tell more
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
            cells = [f"FAILED: {reason}"]
        self.failed += bool(reason)
        line(name, *cells)


def linear_cuts(architecture: int) -> Iterator[tuple[str, int, Any]]:
    """Name, architecture of the kernel (0: the one for any GPU), cut; None: as it is launched."""
    from moec.kernels.launches.many_linear import NARROW, PORTABLE, WIDE
    from moec.kernels.launches.prefill import Product

    yield "triton, portable", 0, PORTABLE
    yield "triton, 128 x 128", 0, Product(columns=64, stages=4)
    yield "triton, 128 x 256", 0, Product(columns=128, stages=3)
    if architecture == 90:
        yield "hopper, wide", 90, WIDE
        yield "hopper, narrow", 90, NARROW
        yield "hopper, wide, group 4", 90, Product(chunk=0, group=4)
        yield "hopper, wide, group 16", 90, Product(chunk=0, group=16)
        yield "hopper, wide, chunk 2560", 90, Product(chunk=2560)
        yield "hopper, wide, chunk 640", 90, Product(chunk=640)
    yield "as launched", architecture, None


def scaled_mm(codes: Tensor, scale: Tensor, weight: Tensor, by_output: Tensor) -> Tensor:
    return torch._scaled_mm(
        codes, weight.t(), scale[:, None], by_output[None], out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip


def linears(architecture: int, programs: int, only: str) -> int:
    """Print the rows of the linear layer; return how many are wrong."""
    from tests.kernels.many_cases import (
        LINEAR,
        MOST,
        checked,
        linear,
        linear_by_kernel,
        linear_launch,
    )
    from tests.kernels.step_cases import error

    checks = [linear("cuda", *case) for case in (*LINEAR, *CHECKED_PRODUCTS)]
    given = [linear("cuda", *sizes)[0] for _, *sizes in PRODUCTS]
    needed = [2.0 * width * dim * tokens for _, width, dim, tokens in PRODUCTS]
    line("linear", *(f"{name} {tokens}" for name, *_, tokens in PRODUCTS))
    # the tensor core adds up FP8 products in few bits, more coarsely with more inputs
    torchs = [error(scaled_mm(*each), expected) for each, expected in checks]
    limits = [max(MOST, 1.2 * each) for each in torchs]
    table = Table()
    table.row(
        "torch",
        lambda: "",
        lambda: (
            timed(partial(scaled_mm, *each), ops) for each, ops in zip(given, needed, strict=True)
        ),
    )
    for name, kernel, cut in linear_cuts(architecture):
        if only == "hopper" and kernel != 90:
            continue

        def check(kernel: int = kernel, cut: Any = cut) -> str:
            found = (
                checked(partial(linear_by_kernel, each, kernel, programs, cut), expected, most)
                for (each, expected), most in zip(checks, limits, strict=True)
            )
            return next((each for each in found if each), "")

        def times(kernel: int = kernel, cut: Any = cut) -> Iterator[str]:
            for each, ops in zip(given, needed, strict=True):
                yield timed(linear_launch(each, kernel, programs, cut), ops)

        table.row(name, check, times)
    large, expected = checks[len(LINEAR)]
    ours = error(linear_by_kernel(large, architecture, programs), expected)
    print(f"errors at {CHECKED_PRODUCTS[0]}: {ours:.2e}, torch's {torchs[len(LINEAR)]:.2e}\n")
    return table.failed


def attention_cuts(architecture: int) -> Iterator[tuple[str, Any]]:
    """Name and cut: slots of a tile, and how many tiles are under way; None: as it is launched."""
    from moec.kernels.launches.attend_many import FAST, Cut

    yield "triton, 128 x 64 x 3", Cut(128, 64, 3, 8)
    yield "triton, 128 x 128 x 2", Cut(128, 128, 2, 8)
    yield "triton, 128 x 128 x 3", Cut(128, 128, 3, 8)
    yield "triton, 64 x 64 x 3", Cut(64, 64, 3, 4)
    if architecture == 90:
        yield "hopper, 128 x 2, turns", FAST
        yield "hopper, 128 x 2", Cut(128, 128, 2, 4, hopper=True, turns=False)
        yield "hopper, 64 x 4, turns", Cut(128, 64, 4, 4, hopper=True)
        yield "hopper, 64 x 5", Cut(128, 64, 5, 4, hopper=True, turns=False)
    yield "as launched", None


def of_torch(tokens: int, slots: int, backend: SDPBackend) -> Callable[[], Tensor]:
    """torch's attention from the last `tokens` of `slots`."""
    heads, kv_heads, size = HEADS
    q = torch.randn(1, tokens, heads, size, device="cuda").bfloat16().transpose(1, 2)
    k, v = (torch.randn(1, kv_heads, slots, size, device="cuda").bfloat16() for _ in range(2))
    how: dict[str, Any] = {"is_causal": True}
    if tokens != slots:
        how = {"attn_mask": causal_lower_right(tokens, slots)}

    def call() -> Tensor:
        with sdpa_kernel(backend):
            found: Tensor = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
        return found

    return call


def attentions(architecture: int, programs: int, only: str) -> int:
    """Print the rows of attention; return how many are wrong."""
    from tests.kernels.many_cases import (
        ATTENTION,
        attention,
        attention_by_kernel,
        attention_launch,
        checked,
        random_attention,
    )

    mine = [attention("cuda", *case) for case in CHECKED_ATTENTION]
    others = [attention("cuda", *case) for case in (*ATTENTION, random_attention())]
    given = [attention("cuda", *HEADS, *each, (each[1] - 1,), False)[0] for each in ATTENDED]
    seen = [tokens * slots - tokens * (tokens - 1) / 2 for tokens, slots in ATTENDED]
    needed = [4.0 * HEADS[0] * HEADS[2] * each for each in seen]
    line("attention", *(f"{tokens} over {slots}" for tokens, slots in ATTENDED))
    table = Table()
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def torch_times(backend: SDPBackend = backend) -> Iterator[str]:
            for each, ops in zip(ATTENDED, needed, strict=True):
                try:
                    yield timed(of_torch(*each, backend), ops)
                except RuntimeError as error:
                    yield str(error).splitlines()[0][:24]

        table.row(f"torch, {backend.name.lower()[:14]}", lambda: "", torch_times)
    for name, cut in attention_cuts(architecture):
        if only == "hopper" and cut and not cut.hopper:
            continue

        def check(cut: Any = cut) -> str:
            cases = mine if cut else mine + others
            found = (
                checked(partial(attention_by_kernel, each, architecture, programs, cut), expected)
                for each, expected in cases
            )
            return next((each for each in found if each), "")

        def times(cut: Any = cut) -> Iterator[str]:
            for each, ops in zip(given, needed, strict=True):
                yield timed(attention_launch(each, architecture, programs, cut), ops)

        table.row(name, check, times)
    return table.failed


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--only", choices=("linear", "attention", "hopper"), default="")
    only = arguments.parse_args().only
    need_gpu("benchmarks/many_tokens.py")
    torch.manual_seed(torch.seed() % 2**31)
    device = torch.cuda.get_device_properties(0)
    architecture = 10 * device.major + device.minor
    print(f"{device.name}, torch {torch.__version__}", flush=True)
    failed = 0
    if only != "attention":
        failed += linears(architecture, device.multi_processor_count, only)
    if only != "linear":
        failed += attentions(architecture, device.multi_processor_count, only)
    if failed:
        print(f"{failed} rows are wrong", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
