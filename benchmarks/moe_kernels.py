"""Time the FP8 MoE kernels on a GPU, beside its memory bandwidth and torch.

    python benchmarks/moe_kernels.py [--layer scout] [--tokens 1,8,64]

A layer has the sizes of a preset, such as scout, qwen3-30b-a3b or deepseek-v3, and random weights;
deepseek-v3 has a scale for each block of 128 x 128 weights, as its published weights do. Times are
medians of CUDA graph replays over eight layers and inputs in turn, or as many as fit the GPU. The
graph of a routed layer for few tokens has eight such turns, because its start costs several us.
"rate" counts the bytes that the layer needs: those of the distinct chosen experts and of the shared
ones. "share" compares it with the bandwidth of a large copy in the same run. "TFLOP/s" counts the
products that the tokens need. "torch" is the same layer by torch's grouped product,
`torch._scaled_grouped_mm`, with a scale for each output.
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
from moec.graph_builder.ops.fused.routed import of_logits
from moec.graph_builder.ops.moe import weights_of
from moec.graph_builder.ops.operands import Ranks, Route, RoutedLayer, arguments
from moec.kernels.sizes import RoutedSizes, Sizes
from moec.runtime.engines.gpu import check_device
from moec.spec.errors import MoecError
from moec.spec.presets import PRESETS

SCOUT = Sizes(dim=5120, hidden=8192, experts=16)
#: layers in turn, so that no weights stay in the GPU's cache
LAYERS = 8
#: turns of a graph for so many tokens
TURNS, FEW = 8, 64
#: the preset whose published weights are in blocks, and their side
BLOCKS = {"deepseek-v3": 128}


def random_codes(out: int, inner: int, block: int, device: str) -> tuple[Tensor, Tensor]:
    """A random E4M3 weight [out, inner], and its scales: for each output, or each block."""
    wide = torch.randn(out, inner, device=device) / inner**0.5
    cut = wide.view(-1, block or 1, inner // (block or inner), block or inner)
    scale = cut.abs().amax((1, 3)) / 448
    codes = (cut / scale[:, None, :, None]).view(out, inner).to(torch.float8_e4m3fn)
    return codes, scale if block else scale[:, 0]


def random_weights(sizes: Sizes | RoutedSizes, device: str = "cuda") -> dict[str, Tensor]:
    """Random operands of the op `moe_layer` or `routed_layer`, by name and in order."""
    router = torch.randn(sizes.experts, sizes.dim, device=device) / sizes.dim**0.5
    found = {"router": router.bfloat16()}
    block, shared = 0, 1
    if isinstance(sizes, RoutedSizes):
        block, shared = sizes.block, sizes.shared
        if sizes.routing.bias:
            found["bias"] = torch.randn(sizes.experts, device=device) / 8
    for name, out, inner in (
        ("gate_up", 2 * sizes.hidden, sizes.dim),
        ("down", sizes.dim, sizes.hidden),
    ):
        count = sizes.experts + shared
        first, scale = random_codes(out, inner, block, device)
        codes = torch.empty(count, *first.shape, dtype=first.dtype, device=device)
        scales = torch.empty(count, *scale.shape, device=device)
        for expert in range(count):
            codes[expert], scales[expert] = random_codes(out, inner, block, device)
        found |= {name: codes, f"{name}_scale": scales}
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


def operands(sizes: RoutedSizes, weights: dict[str, Tensor], x: Tensor) -> RoutedLayer[Tensor]:
    """The operands of `routed_layer`."""
    r, names = sizes.routing, ("gate_up", "gate_up_scale", "down", "down_scale")
    given = weights["router"], weights.get("bias"), *(weights[name] for name in names)
    choice = r.score, r.choice, r.groups, r.kept_groups, r.normalise, r.factor, r.weighed
    return RoutedLayer(x, *given, sizes.top_k, *choice, sizes.block)


def ranked(layer: RoutedLayer[Tensor], logits: Tensor) -> Tensor:
    """What experts are chosen by, [T, E], by the eager op."""
    if layer.choice == "logits":
        return logits
    groups = layer.groups, layer.kept_groups
    found: Tensor = ops.ranks.eager(*arguments(Ranks(logits, layer.bias, layer.score, *groups)))
    return found


def without_ties(layer: RoutedLayer[Tensor], logits: Tensor) -> Tensor:
    """The tokens whose last expert is clearly better than the next one: bool [T].

    Of equal values kernels take the first, and torch any.
    """
    best = ranked(layer, logits).float().topk(min(layer.top_k + 1, logits.shape[1])).values
    return (best[:, layer.top_k - 1] - best[:, -1] > 1e-6) | (layer.top_k == logits.shape[1])


def error_of_routed(
    sizes: RoutedSizes, weights: dict[str, Tensor], values: dict[str, Any]
) -> float:
    """The error of a layer of any routing, from its own logits on."""
    logits = values["logits"].sum(0).bfloat16()
    layer = operands(sizes, weights, values["x"])
    rows, expected = without_ties(layer, logits), of_logits(layer, logits)
    rows |= not rows.any()
    return error(values["out"][rows], expected[rows])


def grouped(sizes: RoutedSizes, weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The same layer by torch's grouped product, shared experts and all."""
    many = sizes.experts + sizes.shared
    scales = {
        name: weights[f"{name}_scale"] if not sizes.block
        else torch.full(weights[name].shape[:2], 1e-3, device="cuda")
        for name in ("gate_up", "down")
    }  # fmt: skip

    def encoded(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.float().abs().amax(1).div(448).clamp(min=1e-12)
        return (x / scale[:, None]).to(torch.float8_e4m3fn), scale

    def product(name: str, x: Tensor, ends: Tensor) -> Tensor:
        codes, scale = encoded(x)
        weight = weights[name].transpose(1, 2)
        found: Tensor = torch._scaled_grouped_mm(
            codes, weight, scale, scales[name], offs=ends, out_dtype=torch.bfloat16
        )
        return found

    def run(x: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(x, weights["router"])
        layer = operands(sizes, weights, x)
        chosen = ranked(layer, logits).topk(layer.top_k).indices
        record = Route(logits, logits, layer.top_k, layer.score, layer.normalise, layer.factor)
        gain = weights_of(record, chosen)
        shared = torch.arange(sizes.experts, many, device=x.device).expand(len(x), -1)
        gain = torch.cat([gain.float(), torch.ones_like(shared, dtype=torch.float32)], 1)
        chosen = torch.cat([chosen, shared], 1)
        order = chosen.flatten().argsort()
        ends = (chosen.flatten()[:, None] == torch.arange(many, device=x.device)).sum(0)
        ends = ends.cumsum(0).to(torch.int32)
        gate, up = product("gate_up", x[order // sizes.slots], ends).chunk(2, 1)
        out = product("down", torch.nn.functional.silu(gate) * up, ends)
        back = torch.empty_like(out)
        back[order] = out
        return (back.view(len(x), sizes.slots, -1) * gain[..., None]).sum(1).to(x.dtype)

    return run


def rows_of_scout(counts: list[int], rate: float) -> list[list[str]]:
    from moec.kernels.torch.launch import run  # imports Triton
    from moec.kernels.torch.moe import DecodeMoe

    weights, rows = random_weights(SCOUT), []
    expert = 3 * SCOUT.dim * SCOUT.hidden
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
        work, off = 4 * tokens * expert, error(found, expected)
        rows.append(row(tokens, took, needed, work, rate, parts, "", off, repeats))
    return rows


def rows_of_routed(sizes: RoutedSizes, counts: list[int], rate: float) -> list[list[str]]:
    from moec.kernels.torch.launch import run  # imports Triton
    from moec.kernels.torch.routed import RoutedMoe

    expert = 3 * sizes.dim * sizes.hidden
    room = torch.cuda.mem_get_info()[0] * 0.9
    many = max(1, min(LAYERS, int(room / expert / (sizes.experts + sizes.shared))))
    print(f"{many} layers in turn, {sizes}")
    weights = [random_weights(sizes) for _ in range(many)]
    layers, rows = [RoutedMoe(sizes, each) for each in weights], []
    for tokens in counts:
        xs = [torch.randn(tokens, sizes.dim, device="cuda").bfloat16() for _ in range(many)]
        values = layers[0].run(layers[0].values(xs[0]))
        off = error_of_routed(sizes, weights[0], values)
        layers[0](xs[-1] + 1)
        repeats = torch.equal(layers[0](xs[0]), values["out"])
        chosen = [
            ranked(operands(sizes, each, x), torch.nn.functional.linear(x, each["router"]))
            .topk(sizes.top_k)
            .indices
            for each, x in zip(weights, xs, strict=True)
        ]
        distinct = sum(len(each.unique()) + sizes.shared for each in chosen) / many
        turns = TURNS if tokens <= FEW else 1
        pairs = list(zip(layers, xs, strict=True)) * turns
        took = microseconds(lambda pair: pair[0](pair[1]), pairs)
        scratch = [(layer, layer.run(layer.values(x))) for layer, x in pairs[:many]] * turns
        parts = [
            microseconds(lambda pair, each=each: run(each, pair[1]), scratch)
            for each in layers[0].launches(tokens)
        ]
        theirs = [(grouped(sizes, each), x) for each, x in zip(weights, xs, strict=True)] * turns
        torchs = microseconds(lambda pair: pair[0](pair[1]), theirs)
        work, theirs_took = 2 * tokens * sizes.slots * expert, f"{torchs:.1f} us"
        needed = expert * distinct
        rows.append(row(tokens, took, needed, work, rate, parts, theirs_took, off, repeats))
    return rows


def row(
    tokens: int, took: float, needed: float, work: float, rate: float, parts: list[float],
    torchs: str, off: float, repeats: bool,
) -> list[str]:  # fmt: skip
    return [
        str(tokens), f"{took:.1f} us", f"{needed / rate * 1e6:.1f} us", f"{work / took / 1e6:.0f}",
        f"{needed / took / 1e6:.2f} TB/s", f"{100 * needed / took * 1e6 / rate:.1f} %",
        ", ".join(f"{p:.1f}" for p in parts), torchs, f"{off:.1e}",
        "to the bit" if repeats else "NO",
    ]  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tokens", default="1,2,4,8,16,32,64")
    arguments.add_argument("--layer", default="scout", choices=list(PRESETS))
    given = arguments.parse_args()
    counts = [int(each) for each in given.tokens.split(",")]
    need_gpu("benchmarks/moe_kernels.py")
    torch.manual_seed(torch.seed() % 2**31)
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {rate / 1e12:.2f} TB/s")
    if given.layer == "scout":
        rows = rows_of_scout(counts, rate)
    else:
        text = PRESETS[given.layer].text
        experts = next(each.experts for each in text.all_layers if each.experts)
        rows = rows_of_routed(
            RoutedSizes.of(text.dim, experts, BLOCKS.get(given.layer, 0)), counts, rate
        )
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in (
        "tokens", "layer", "its bytes", "TFLOP/s", "rate", "share", "its launches", "torch",
        "error", "repeats"
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for each in rows:
        table.add_row(*each)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
