"""Time the FP8 MoE kernels for many tokens on a GPU, and compare with a dense FP8 product.

    python benchmarks/prefill_kernels.py [--tokens 512,1024,4096,8192] [--tune]

The layer has Scout's sizes (dim 5120, hidden 8192, 16 routed experts and a shared one) and random
weights. Times are medians of CUDA graph replays. Rates count the matrix products that the layer
needs, without padding. "share" compares them with `torch._scaled_mm` of 8192^3 in the same run.
"torch" is the time of the two products only, by `torch._scaled_grouped_mm`, without routing,
SwiGLU and quantisation. Errors are relative to the eager op. --tune tries several tile sizes for
each product, with 4096 tokens.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from moe_kernels import SCOUT, error, microseconds, need_gpu, random_weights
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moec.graph_builder.ops import moe_layer

FP8 = torch.float8_e4m3fn


def dense_rate(size: int = 8192) -> float:
    """The operations per second of one FP8 matrix product with a scale for each row."""
    a, b = (torch.randn(size, size, device="cuda").to(FP8) for _ in range(2))
    one = torch.ones(size, 1, device="cuda")
    took = microseconds(
        lambda _: torch._scaled_mm(
            a, b.t(), one, one.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        [a],
    )
    return 2 * size**3 / took * 1e6


def grouped(weights: dict[str, Tensor], chosen: Tensor) -> tuple[float, float]:
    """The microseconds of both matrix products in torch, on tokens that are already sorted."""
    counts = torch.bincount(chosen, minlength=SCOUT.experts)
    ends = torch.cat([counts, counts.sum()[None]]).cumsum(0).to(torch.int32)
    rows = 2 * len(chosen)
    found = []
    for name, inputs in (("gate_up", SCOUT.dim), ("down", SCOUT.hidden)):
        codes = torch.randn(rows, inputs, device="cuda").to(FP8)
        scale = torch.ones(rows, device="cuda")
        weight, by_output = weights[name].transpose(1, 2), weights[f"{name}_scale"]

        def call(
            _: Tensor, a: Tensor = codes, b: Tensor = weight, one: Tensor = scale,
            two: Tensor = by_output,
        ) -> Tensor:  # fmt: skip
            return torch._scaled_grouped_mm(
                a, b, one, two, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        found.append(microseconds(call, [codes], 11))
    return found[0], found[1]


def launch_times(layer: Any, x: Tensor) -> dict[str, float]:
    """The microseconds of each launch of a `PrefillMoe`, timed separately."""
    from moec.kernels.torch.launch import run

    values = layer.run(layer.values(x))
    return {
        each.name: microseconds(lambda _, each=each: run(each, values), [x], 11)
        for each in layer.launches(len(x))
    }


def cuts(inputs: int) -> Iterator[tuple[bool, dict[str, int]]]:
    """Kernel tile sizes to try, as fields of `Product`; True marks those of Hopper's kernels."""
    for stages, columns in ((3, 128), (4, 128), (4, 64)):
        yield False, {"stages": stages, "columns": columns}
    for chunk in (0, inputs // 2, 2048, 1024, 512):
        yield True, {"chunk": chunk}
    for group in (4, 16, 32):
        yield True, {"group": group}
    yield True, {"columns": 64, "stages": 6}
    yield True, {"stages": 3}
    yield True, {"depth": 64, "stages": 8}


def tune(weights: dict[str, Tensor], tiles: Any, dense: float, tokens: int = 4096) -> None:
    from moec.kernels.launches.prefill import Product, Tiles
    from moec.kernels.torch.launch import run
    from moec.kernels.torch.prefill import PrefillMoe

    plain = Tiles(gate_up=Product(stages=3), down=Product(stages=3), hopper=False)
    x = torch.randn(tokens, SCOUT.dim, device="cuda").bfloat16()
    expected = moe_layer.eager(x, *weights.values())
    for name, inputs, ops in (("gate_up", SCOUT.dim, 4), ("down", SCOUT.hidden, 2)):
        needed = ops * SCOUT.dim * SCOUT.hidden * 2 * tokens
        for hopper, cut in cuts(inputs):
            if hopper and not tiles.hopper:
                continue
            product = Product(**cut)
            one = replace(tiles if hopper else plain, **{name: product}, programs=tiles.programs)
            try:
                layer = PrefillMoe(SCOUT, weights, one)
                values = layer.run(layer.values(x))
                wrong = error(values["out"], expected)
                launch = next(each for each in layer.launches(tokens) if each.name == name)
                took = microseconds(
                    lambda _, launch=launch, values=values: run(launch, values), [x], 11
                )
            except Exception as reason:  # try the other tile sizes even if one fails
                print(name, product, f"failed: {str(reason)[:200]}", flush=True)
                continue
            rate = needed / took * 1e6
            print(
                f"{name} {'hopper' if hopper else 'triton'} columns {product.columns} "
                f"depth {product.depth} stages {product.stages} chunk {product.chunk} "
                f"group {product.group}: {took:.0f} us, "
                f"{rate / 1e12:.0f} TFLOP/s, {100 * rate / dense:.0f} %, "
                f"layer's error {wrong:.1e}", flush=True,
            )  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tokens", default="512,1024,4096,8192")
    arguments.add_argument("--tune", action="store_true")
    given = arguments.parse_args()
    need_gpu("benchmarks/prefill_kernels.py")
    from moec.kernels.launches.prefill import tiles_for  # imports Triton
    from moec.kernels.torch.prefill import PrefillMoe

    torch.manual_seed(torch.seed() % 2**31)
    device = torch.cuda.get_device_properties(0)
    tiles = tiles_for(10 * device.major + device.minor, device.multi_processor_count)
    dense = dense_rate()
    print(f"{device.name}, torch {torch.__version__}: dense {dense / 1e12:.0f} TFLOP/s", flush=True)
    weights = random_weights(SCOUT)
    if given.tune:
        tune(weights, tiles, dense)
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("tokens", "layer", "rate", "share", "torch", "error", "repeats"):
        table.add_column(column, justify="right")
    for tokens in (int(each) for each in given.tokens.split(",")):
        x = torch.randn(tokens, SCOUT.dim, device="cuda").bfloat16()
        layer = PrefillMoe(SCOUT, weights, tiles)
        found = layer(x)
        wrong = error(found, moe_layer.eager(x, *weights.values()))
        repeats = all(torch.equal(layer(x), found) for _ in range(3))
        took = microseconds(layer, [x], 11)
        rate = 2 * 3 * SCOUT.dim * SCOUT.hidden * 2 * tokens / took * 1e6
        chosen = (x.float() @ weights["router"].float().t()).argmax(1)
        try:
            torch_too = "{:.0f} + {:.0f} us".format(*grouped(weights, chosen))
        except RuntimeError as reason:
            torch_too = str(reason).splitlines()[0][:30]
        times = ", ".join(f"{name} {us:.1f}" for name, us in launch_times(layer, x).items())
        print(f"{tokens} tokens: {times} us", flush=True)
        table.add_row(
            str(tokens), f"{took:.0f} us", f"{rate / 1e12:.0f} TFLOP/s",
            f"{100 * rate / dense:.1f} %", torch_too,
            f"{wrong:.1e}", "to the bit" if repeats else "NO",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
