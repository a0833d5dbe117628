"""Measure kernels and the whole of Scout on one H200, and compare with the limits of the GPU.

    python benchmarks/h200.py [--out ARTEFACT] [--parts kernels,peers,model,contexts] [--json FILE]

One table shows each kernel of a decode step and of prefill at Scout's sizes, its peers, and the
whole of Scout in FP8. The weights are random and drawn on the GPU, and run through an artefact of
target torch. The limits are measured first, in the same run: a copy of 2 GiB, and an FP8 matrix
product of 8192^3. Rates count the bytes that the work needs: those of the distinct chosen experts,
of the shared expert, and of the keys and values in use. Kernel times are medians of CUDA graph
replays over several inputs and weights. Times of whole steps are wall-clock times. `vllm_peer.py`
compares the rows of the model with vLLM.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from moe_kernels import SCOUT, copy_rate, error, microseconds, need_gpu, random_weights
from prefill_kernels import dense_rate, grouped
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moec
from moec.artefact.artefact import open_artefact
from moec.graph_builder import ops
from moec.runtime.engines.synthetic import synthetic
from moec.runtime.engines.torch_program import torch_with
from moec.runtime.open import artefact_session
from moec.runtime.session import Session
from moec.spec.presets import PRESETS

FP8 = torch.float8_e4m3fn
TEXT = PRESETS["scout"].text
EXPERT = 3 * SCOUT.dim * SCOUT.hidden
#: name, microseconds, bytes, operations, remark
Row = tuple[str, float, float | None, float | None, str]


def narrow(*shape: int) -> tuple[Tensor, Tensor]:
    wide = torch.randn(*shape, device="cuda") / shape[-1] ** 0.5
    scale = wide.abs().amax(-1) / 448
    return (wide / scale[..., None]).to(FP8), scale


def step_kernels() -> Iterator[Row]:
    """Each kernel of a layer except the experts, over 12 weights and caches in turn."""
    from moec.kernels.torch import ops as torch_ops  # imports Triton

    turns = list(range(12))
    width = TEXT.q_width + 2 * TEXT.kv_width
    qkv, o = ([narrow(n, TEXT.dim) for _ in turns] for n in (width, TEXT.dim))
    gain = torch.ones(TEXT.dim, device="cuda").bfloat16()
    slots, total = 1024, torch.tensor(1024, dtype=torch.int32)
    for tokens in (1, 8, 64):
        x = torch.randn(tokens, TEXT.dim, device="cuda").bfloat16()
        codes, scale, _ = torch_ops.skip_norm_fp8(x, x, gain, 1e-5)
        yield (
            f"norm, codes: {tokens} tokens",
            microseconds(lambda _, x=x: torch_ops.skip_norm_fp8(x, x, gain, 1e-5), turns),
            None, None, "",
        )  # fmt: skip
        for name, weights in (("q, k, v", qkv), ("o", o)):
            took = microseconds(
                lambda i, w=weights, c=codes, s=scale: torch_ops.fp8_linear(c, s, *w[i], "bf16"),
                turns,
            )
            yield f"FP8 linear {name}: {tokens} tokens", took, weights[0][0].numel(), None, ""
        rows = torch.randn(tokens, width, device="cuda").bfloat16()
        shape = (tokens, TEXT.kv_heads, slots, TEXT.head_dim)
        caches = [[torch.randn(shape, device="cuda").bfloat16() for _ in "kv"] for _ in turns]
        last = torch.full((tokens,), slots - 1, dtype=torch.int32, device="cuda")
        table = torch.rand(tokens, 1, TEXT.head_dim // 2, device="cuda")
        took = microseconds(
            lambda i, r=rows, t=table, c=caches, at=last: torch_ops.attention_fp8(
                r, t, t, None, *c[i], at, total, TEXT.heads, TEXT.kv_heads, 1e-5
            ),
            turns,
        )
        read = 2 * caches[0][0].nbytes
        yield f"RoPE, norm, cache, attention: {tokens} x 1k", took, read, None, ""
        q = torch.randn(tokens, TEXT.heads, 1, TEXT.head_dim, device="cuda").bfloat16()
        took = microseconds(
            lambda i, q=q, c=caches: torch.nn.functional.scaled_dot_product_attention(
                q, *c[i], enable_gqa=True
            ),
            turns,
        )
        yield "    torch SDPA, attention only", took, read, None, ""


def experts() -> Iterator[Row]:
    """The whole MoE layer: router, quantisation, routed and shared experts, sum."""
    from moec.kernels.torch.moe import DecodeMoe  # imports Triton
    from moec.kernels.torch.prefill import PrefillMoe

    layers = [random_weights(SCOUT) for _ in range(4)]
    runs = [DecodeMoe(SCOUT, weights) for weights in layers]
    for tokens in (1, 8, 64):
        inputs = [torch.randn(tokens, SCOUT.dim, device="cuda").bfloat16() for _ in range(8)]
        found = runs[0](inputs[0])
        remark = _check(layers[0], inputs[0], found, runs[0](inputs[0]))
        chosen = [(x.float() @ layers[i % 4]["router"].float().t()).argmax(1)
                  for i, x in enumerate(inputs)]  # fmt: skip
        needed = EXPERT * sum(len(each.unique()) + 1 for each in chosen) / len(inputs)
        took = microseconds(lambda i, inputs=inputs: runs[i % 4](inputs[i]), list(range(8)))
        yield f"MoE layer: {tokens} tokens", took, needed, None, remark
        if tokens > 1:
            one = grouped(layers[0], chosen[0])
            yield "    torch grouped, two products only", sum(one), needed, None, ""
    for tokens in (1024, 4096, 8192):
        x = torch.randn(tokens, SCOUT.dim, device="cuda").bfloat16()
        layer = PrefillMoe(SCOUT, layers[0])
        found = layer(x)
        remark = _check(layers[0], x, found, layer(x))
        operations = 2 * EXPERT * 2 * tokens
        took = microseconds(lambda _, x=x, layer=layer: layer(x), [0], 11)
        yield f"MoE layer: {tokens} tokens", took, None, operations, remark
        chosen = (x.float() @ layers[0]["router"].float().t()).argmax(1)
        one = grouped(layers[0], chosen)
        yield "    torch grouped, two products only", sum(one), None, operations, ""


def _check(weights: dict[str, Tensor], x: Tensor, found: Tensor, again: Tensor) -> str:
    wide, count = x.float(), SCOUT.experts
    best, chosen = (wide @ weights["router"].float().t()).bfloat16().max(-1)
    plain = torch.zeros_like(wide)
    for expert in [*chosen.unique().tolist(), count]:
        mine = torch.arange(len(x), device="cuda") if expert == count else (
            chosen == expert).nonzero()[:, 0]  # fmt: skip
        rows = wide[mine] * (1 if expert == count else best[mine, None].float().sigmoid())
        gate_up, down = (
            weights[name][expert].float() * weights[f"{name}_scale"][expert][:, None]
            for name in ("gate_up", "down")
        )
        gate, up = (rows @ gate_up.t()).chunk(2, -1)
        plain[mine] += (torch.nn.functional.silu(gate) * up) @ down.t()
    return (
        f"eager {error(found, ops.moe_layer.eager(x, *weights.values())):.1e}, float32 "
        f"{error(found, plain):.1e}, {'repeats' if torch.equal(found, again) else 'DIFFERS'}"
    )


def peers() -> Iterator[Row]:
    """The MoE layer of Hugging Face transformers in bf16, eager and compiled."""
    from moec.runtime.bench.torchvision_ops import declare_torchvision_ops

    declare_torchvision_ops()
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(
        hidden_size=SCOUT.dim, intermediate_size=SCOUT.hidden, num_local_experts=SCOUT.experts,
        num_experts_per_tok=1,
    )  # fmt: skip
    with torch.device("cuda"):
        layer = Llama4TextMoe(config).bfloat16()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    compiled = torch.compile(layer)
    with torch.inference_mode():
        for tokens in (1, 64):
            xs = [torch.randn(1, tokens, SCOUT.dim, device="cuda").bfloat16() for _ in range(4)]
            yield f"    HF eager, bf16: {tokens} tokens", _events(layer, xs), None, None, ""
            took = microseconds(lambda x: compiled(x), xs)
            yield f"    HF torch.compile, bf16: {tokens} tokens", took, None, None, ""


def _events(call: Callable[[Tensor], object], inputs: list[Tensor]) -> float:
    times = []
    for _ in range(8):
        for x in inputs:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(x)
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def decode_ms(session: Session, batch: int, context: int, steps: int = 48) -> float:
    """Wall-clock milliseconds of a step and the choice of its token, after `context` tokens."""
    capacity = context + 2 * steps
    ids = torch.randint(0, session.spec.text.vocab, (batch, context))
    logits, cache = session.prefill(ids, capacity=capacity)
    return _steps(session, logits.argmax(-1), cache, steps)


def _steps(session: Session, tokens: Tensor, cache: object, steps: int) -> float:
    tokens, times = tokens.cuda(), []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps // 3):
            tokens = session.decode(tokens, cache).argmax(-1)  # type: ignore[arg-type]
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / (steps // 3))
    return statistics.median(times)


def _generate_ms(session: Session, ids: Tensor, count: int) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        session.generate(ids, max_new_tokens=count, temperature=0.0, stop=())
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def whole_model(session: Session) -> Iterator[Row]:
    """All 48 layers of Scout."""
    for batch in (1, 8, 64):
        took = decode_ms(session, batch, 1024)
        read = moec.plan(session.spec, "fp8", context=1024, batch=batch).decode_read_bytes
        yield f"Scout: decode, batch {batch}, 1k", 1e3 * took, read, None, ""
    ids = torch.randint(0, TEXT.vocab, (1, 1024))
    one, many = (_generate_ms(session, ids, count) for count in (1, 97))
    read = moec.plan(session.spec, "fp8", context=1024).decode_read_bytes
    yield "Scout: generate, batch 1, 1k", 1e3 * (many - one) / 96, read, None, ""
    for tokens in (1024, 8192):
        operations = moec.plan(session.spec, "fp8", context=tokens).prefill_flops
        took = 1e3 * prefill_ms(session, tokens)
        yield f"Scout: prefill, {tokens} tokens", took, None, operations, ""


def prefill_ms(session: Session, tokens: int) -> float:
    """Wall-clock milliseconds of a prompt, the best of three."""
    ids, times = torch.randint(0, session.spec.text.vocab, (1, tokens)), []
    for _ in range(3):
        start = time.perf_counter()
        session.prefill(ids)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def contexts(session: Session, weights: int) -> Iterator[Row]:
    """Long contexts: their memory and that which `plan` predicts, and the time of a step."""
    for context in (131072, 524288):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        cache = session.new_cache(1, context)
        cache.lengths.fill_(context - 64)
        took = _steps(session, torch.tensor([1]), cache, 48)
        planned = moec.plan(session.spec, "fp8", context=context)
        caches = sum(each.nbytes for each in cache.tensors.values())
        peak = torch.cuda.max_memory_allocated()
        yield (
            f"Scout: decode at {context // 1024}k", 1e3 * took, planned.decode_read_bytes, None,
            f"caches {caches / 1e9:.2f} GB, planned {planned.cache_bytes / 1e9:.2f}; weights "
            f"{weights / 1e9:.2f}; peak {peak / 1e9:.2f} GB",
        )  # fmt: skip
        del cache


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", help="an artefact of Scout for target torch; built if left out")
    arguments.add_argument("--parts", default="kernels,peers,model,contexts")
    arguments.add_argument("--json", type=Path, help="write the rows to this file")
    given = arguments.parse_args()
    parts = given.parts.split(",")
    need_gpu("benchmarks/h200.py")
    torch.manual_seed(torch.seed() % 2**31)
    copy, dense = copy_rate(), dense_rate()
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("", "us", "TB/s", "TFLOP/s", "of the limit", ""):
        table.add_column(column, justify="left" if not column else "right")

    found: list[dict[str, str | float | None]] = []

    def add(rows: Iterator[Row]) -> None:
        for name, took, read, operations, remark in rows:
            bytes_each = read / took * 1e6 if read else None
            rate = operations / took * 1e6 if operations else None
            share = bytes_each / copy if bytes_each else rate / dense if rate else None
            found.append({"name": name, "us": took, "limit_us": took * share if share else None})
            shown = (
                name, f"{took:.1f}", f"{bytes_each / 1e12:.2f}" if bytes_each else "",
                f"{rate / 1e12:.0f}" if rate else "", f"{100 * share:.1f} %" if share else "",
                remark,
            )  # fmt: skip
            print(" | ".join(shown), flush=True)
            table.add_row(*shown)

    with torch.inference_mode():
        if "kernels" in parts:
            add(step_kernels())
            add(experts())
        if "peers" in parts:
            add(peers())
    gc.collect()
    torch.cuda.empty_cache()
    if {"model", "contexts"} & set(parts):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            path = (
                given.out
                or moec.export(
                    "scout", target="torch", precision="fp8", out=Path(folder) / "scout"
                ).path
            )
            artefact = open_artefact(path)
            built = time.perf_counter()
            weights = synthetic(artefact.manifest.spec, 1, "cuda")
            torch.cuda.synchronize()
            drawn = time.perf_counter()
            session = artefact_session(artefact, "cuda", engine=torch_with(weights))
        print(
            f"artefact {built - start:.1f} s, weights {drawn - built:.1f} s, session "
            f"{time.perf_counter() - drawn:.1f} s", flush=True,
        )  # fmt: skip
        size = sum(each.nbytes for each in weights.values())
        if "model" in parts:
            add(whole_model(session))
        if "contexts" in parts:
            add(contexts(session, size))
    if given.json:
        run = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        rates = {"copy_tb_s": copy / 1e12, "fp8_tflop_s": dense / 1e12}
        given.json.write_text(json.dumps({**run, **rates, "rows": found}, indent=1))
    print(
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy / 1e12:.2f} "
        f"TB/s, FP8 product {dense / 1e12:.0f} TFLOP/s"
    )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
