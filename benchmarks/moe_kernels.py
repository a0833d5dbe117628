"""Time the FP8 MoE kernels for few tokens on a GPU, and compare with its memory bandwidth.

    python benchmarks/moe_kernels.py [--tokens 1,8,64]

The layer has Scout's sizes (dim 5120, hidden 8192, 16 routed experts and a shared one) and random
weights. Times are medians of CUDA graph replays over eight inputs. "rate" counts the bytes that the
layer needs: those of the distinct chosen experts and of the shared one. "share" compares it with
the bandwidth of a large copy in the same run.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moec.graph_builder import ops
from moec.kernels.sizes import Sizes
from moec.runtime.engines.gpu import check_device
from moec.spec.errors import MoecError

SCOUT = Sizes(dim=5120, hidden=8192, experts=16)


def random_weights(sizes: Sizes, device: str = "cuda") -> dict[str, Tensor]:
    """Random operands of the op `moe_layer`, by name and in order."""
    router = torch.randn(sizes.experts, sizes.dim, device=device) / sizes.dim**0.5
    found = {"router": router.bfloat16()}
    for name, out, inner in (
        ("gate_up", 2 * sizes.hidden, sizes.dim),
        ("down", sizes.dim, sizes.hidden),
    ):
        shape = (sizes.experts + 1, out, inner)
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.empty(shape[:2], device=device)
        for expert in range(shape[0]):
            wide = torch.randn(shape[1:], device=device) / inner**0.5
            scale[expert] = wide.abs().amax(1) / 448
            codes[expert] = (wide / scale[expert][:, None]).to(codes.dtype)
        found |= {name: codes, f"{name}_scale": scale}
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def microseconds(call: Callable[[Any], object], inputs: list[Any], rounds: int = 21) -> float:
    """The median time of a call in microseconds, from a CUDA graph with one call for each input."""
    for x in inputs:
        call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            call(x)
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(inputs))
    return sorted(times)[rounds // 2]


def copy_rate() -> float:
    """The bytes per second that a copy of 2 GiB reads and writes.

    The copy is not in a CUDA graph. There the copy engine would do it, which is a third slower than
    a kernel.
    """
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.nbytes / sorted(times)[len(times) // 2] * 1e3


def need_gpu(command: str) -> None:
    """End with one message and exit code 3 if there is no GPU."""
    try:
        check_device("cuda", command)
    except MoecError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tokens", default="1,2,4,8,16,32,64")
    counts = [int(each) for each in arguments.parse_args().tokens.split(",")]
    need_gpu("benchmarks/moe_kernels.py")
    from moec.kernels.torch.launch import run  # imports Triton
    from moec.kernels.torch.moe import DecodeMoe

    torch.manual_seed(torch.seed() % 2**31)
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {rate / 1e12:.2f} TB/s")
    weights = random_weights(SCOUT)
    expert = 3 * SCOUT.dim * SCOUT.hidden
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("tokens", "layer", "rate", "share", "its launches", "error", "repeats"):
        table.add_column(column, justify="right")
    for tokens in counts:
        inputs = [torch.randn(tokens, SCOUT.dim, device="cuda").bfloat16() for _ in range(8)]
        layer = DecodeMoe(SCOUT, weights)
        found = layer(inputs[0])
        expected = ops.moe_layer.eager(inputs[0], *weights.values())
        layer(inputs[1])
        repeats = torch.equal(layer(inputs[0]), found)
        chosen = [(x.float() @ weights["router"].float().t()).argmax(1) for x in inputs]
        needed = expert * sum(len(each.unique()) + 1 for each in chosen) / len(inputs)
        took = microseconds(layer, inputs)
        values = layer.run(layer.values(inputs[0]))
        parts = [
            microseconds(lambda x, each=each, values=values: run(each, {**values, "x": x}), inputs)
            for each in layer.launches(tokens)
        ]
        table.add_row(
            str(tokens), f"{took:.1f} us", f"{needed / took / 1e6:.2f} TB/s",
            f"{100 * needed / took * 1e6 / rate:.1f} %", ", ".join(f"{p:.1f}" for p in parts),
            f"{error(found, expected):.1e}", "to the bit" if repeats else "NO",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
