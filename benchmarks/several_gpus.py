"""Measure Scout and Maverick on the GPUs of one host, which share each model.

    python benchmarks/several_gpus.py --gpus 2 [--parts sums,tokens,scout,maverick,proof]

The command measures Scout on one GPU first, and then all parts on all GPUs. Weights are random and
drawn on the GPUs; they run through an artefact of target torch. Scout has all its layers; Maverick
has 12 of its 48 on fewer than four GPUs, which do not hold more. The limits are measured in the
same run: a copy of 2 GiB on one GPU, and the all-reduces of NCCL and of torch's symmetric memory.

`sums` is the sum over ranks with residual, norm and FP8 quantisation, in a CUDA graph with work
between the calls, checked against float32 on fresh input. `tokens` compares the tokens of the
trained example with those of one GPU; on more than two GPUs those of a wider model with random
weights. `proof` runs `moec validate` on that model, and on two layers of Scout's widths. A step is
a greedy decode step with the choice of its token. Times are wall-clock times of the slowest rank.
With --vllm-python, vLLM's tensor parallelism is measured too, as in `vllm_peer.py`.
"""

import argparse
import gc
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from moe_kernels import copy_rate, need_gpu
from safetensors.torch import load_file
from torch import Tensor
from vllm_peer import measured, need_vllm, vllm_config

import moec
from moec.artefact.artefact import open_artefact
from moec.kernels.torch.moe import DecodeMoe
from moec.runtime.engines.synthetic import synthetic
from moec.runtime.engines.torch_program import torch_with
from moec.runtime.open import artefact_session
from moec.runtime.ranks.group import join, same, started_as
from moec.runtime.session import Session
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.sharding import ALONE, Rank
from moec.weights.random import write_random_checkpoint

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-scout"
DIM, EPS, CONTEXT = PRESETS["scout"].text.dim, 1e-5, 1024


def say(rank: Rank, *what: object) -> None:
    if rank.index == 0:
        print(*what, flush=True)


def slowest(value: float) -> float:
    """The largest of the ranks' values."""
    if not dist.is_initialized():
        return value
    found = torch.tensor([value], device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def graph_us(step: Callable[[], object], count: int = 64, rounds: int = 30) -> float:
    """Microseconds of a step that a CUDA graph repeats."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            step()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / count)
    return slowest(statistics.median(times))


def plain_us(step: Callable[[], object], count: int = 20) -> float:
    """Microseconds of a step that takes longer than its launches."""
    for _ in range(3):
        step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    return slowest(1e3 * start.elapsed_time(end) / count)


@torch.inference_mode()
def sums(rank: Rank) -> Iterator[str]:
    """The fused sum, beside sums alone by torch and NCCL."""
    import torch.distributed._symmetric_memory as symmetric

    from moec.kernels.torch import collectives

    collectives.meet(DIM, rank)
    gain = torch.randn(DIM, device="cuda", generator=_generator(7)).bfloat16()
    mine = _generator(100 + rank.index)
    for count in (2, 1, 2, 4, 8, 16, 32, 64):
        part, skip = (torch.empty(count, DIM, device="cuda").bfloat16() for _ in range(2))
        worst, off, same = 0.0, 0.0, True
        for turn in range(20):
            part.normal_(generator=mine)
            skip.normal_(generator=_generator(turn))
            codes, scale, total = collectives.all_reduce_norm_fp8(skip, part, gain, EPS, True)
            parts = [torch.empty_like(part) for _ in range(rank.count)]
            dist.all_gather(parts, part)
            want = (sum(each.float() for each in parts) + skip.float()).bfloat16().float()
            worst = max(worst, float((total.float() - want).norm() / want.norm()))
            normed = want * torch.rsqrt(want.pow(2).mean(-1, keepdim=True) + EPS)
            normed = normed.bfloat16().float() * gain.float()
            found = codes.float() * scale[:, None]
            off = max(off, float((found - normed).norm() / normed.norm()))
            everyone = [torch.empty_like(total) for _ in range(rank.count)]
            dist.all_gather(everyone, total)
            same &= all(torch.equal(everyone[0], each) for each in everyone)
        assert same and worst < 1e-6 and off < 0.04, (rank, same, worst, off)
        total = torch.empty_like(part)

        def work(part: Tensor = part, total: Tensor = total) -> None:
            torch.mul(total, 0.5, out=part)

        def fused(part: Tensor = part, skip: Tensor = skip) -> None:
            collectives.all_reduce_norm_fp8(skip, part, gain, EPS, True)
            work(part)

        alone = graph_us(work)
        took = graph_us(fused) - alone
        shared = symmetric.empty(count, DIM, dtype=torch.bfloat16, device="cuda")
        symmetric.rendezvous(shared, dist.group.WORLD)

        def one_shot(shared: Tensor = shared) -> None:
            torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", dist.group.WORLD.group_name)
            work(shared)

        def nccl(part: Tensor = part) -> None:
            dist.all_reduce(part)
            work(part)

        theirs, by_nccl = graph_us(one_shot) - alone, graph_us(nccl) - alone
        yield (
            f"{count:3d} tokens: sum, residual, norm, codes {took:.2f} us; the sum alone: torch's "
            f"one-shot {theirs:.2f}, NCCL {by_nccl:.2f}; equal on all ranks, off float32 "
            f"{worst:.0e}, codes {off:.3f}"
        )
    many = symmetric.empty(8192, DIM, dtype=torch.bfloat16, device="cuda")
    symmetric.rendezvous(many, dist.group.WORLD)
    name = dist.group.WORLD.group_name
    by_nccl = graph_us(lambda: dist.all_reduce(many), 4, 10)
    theirs = graph_us(lambda: torch.ops.symm_mem.two_shot_all_reduce_(many, "sum", name), 4, 10)
    part, skip = (torch.randn_like(many) for _ in range(2))
    ours = [
        plain_us(lambda op=op: op(skip, part, gain, EPS, False))  # type: ignore[misc]
        for op in (collectives.all_reduce_norm_fp8, collectives.all_reduce_norm)
    ]
    yield (
        f"8,192 tokens: sum, residual, norm, codes {ours[0]:.0f} us, without codes {ours[1]:.0f}; "
        f"the sum alone: NCCL {by_nccl:.0f}, torch's two-shot {theirs:.0f}"
    )


def small(gpus: int, folder: Path) -> Path:
    """The trained example; or a random one in `folder`, with experts wide enough for more GPUs."""
    if gpus <= 2:
        return EXAMPLE
    spec = PRESETS["tiny-scout"]
    experts = spec.text.experts.model_copy(update={"hidden": 256, "shared_hidden": 256})
    text = spec.text.model_copy(update={"experts": experts})
    write_random_checkpoint(spec.model_copy(update={"text": text}), folder, seed=1)
    return folder


def tokens(rank: Rank) -> Iterator[str]:
    """The likeliest tokens after each token of a text, beside those of one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(same(folder))  # rank 0 makes what all of them open
        if rank.index == 0:
            moec.export(small(rank.count, out / "wide"), target="torch", out=out / "art")
        dist.barrier()
        artefact = open_artefact(out / "art")
        one, all_ = (
            artefact_session(artefact, "cuda", engine=torch_with(None, each))
            for each in (ALONE, rank)
        )
        ids = load_file(EXAMPLE / "golden.safetensors")["input_ids"]
        alone, found = one.logits(ids), all_.logits(ids)
        dist.barrier()
    noise = float((found - alone).square().mean().sqrt())
    best = alone.topk(2, -1).values
    near = best[..., 0] - best[..., 1] <= 2 * noise
    differ = alone.argmax(-1) != found.argmax(-1)
    repeats = torch.equal(found, all_.logits(ids))
    share, ties = (100 * float(each.float().mean()) for each in (differ, near))
    yield (
        f"small model: {differ.numel()} steps, {share:.1f} % have another token than on one GPU, "
        f"{int((differ & ~near).sum())} of them where two logits are not within {2 * noise:.3f} "
        f"(as in {ties:.1f} % of all steps); {'repeats' if repeats else 'DIFFERS'}"
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def opened(spec: ModelSpec, rank: Rank) -> tuple[Session, int]:
    """A session on random weights, and their bytes on this rank."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "art"
        artefact = open_artefact(moec.export(spec, target="torch", precision="fp8", out=out).path)
        weights = synthetic(artefact.manifest.spec, 1, "cuda", rank=rank)
        session = artefact_session(artefact, "cuda", engine=torch_with(weights, rank))
    return session, sum(each.nbytes for each in weights.values())


@contextmanager
def choices(counts: list[int]) -> Iterator[None]:
    """Add to `counts` how many routed experts each MoE layer chooses in a block."""
    run = DecodeMoe.run

    def counted(self: DecodeMoe, values: dict[str, Any]) -> dict[str, Any]:
        found = run(self, values)
        counts.append(len(found["logits"].argmax(-1).unique()))
        return found

    with mock.patch.object(DecodeMoe, "run", counted):
        yield


def decode_ms(session: Session, batch: int, steps: int = 48) -> tuple[float, int, float]:
    """Milliseconds of a greedy step after `CONTEXT` tokens.

    Also a sum that shows its tokens, and how many experts a layer chose in the first step.
    """
    ids = torch.randint(0, session.spec.text.vocab, (batch, CONTEXT), generator=_host(batch))
    logits, cache = session.prefill(ids, capacity=CONTEXT + 2 * steps)
    tokens, times, counts = logits.argmax(-1).cuda(), list[float](), list[int]()
    with choices(counts):  # the first step with a cache is no CUDA graph
        tokens = session.likeliest(tokens, cache)
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps // 3):
            tokens = session.likeliest(tokens, cache)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / (steps // 3))
    return slowest(statistics.median(times)), int(tokens.sum()), statistics.mean(counts)


def prefill_ms(session: Session, count: int) -> float:
    ids, times = torch.randint(0, session.spec.text.vocab, (1, count), generator=_host(0)), []
    for _ in range(4):
        if dist.is_initialized():
            dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        session.prefill(ids)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return slowest(min(times))


def _host(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.inference_mode()
def model(name: str, layers: int, rank: Rank, copy: float) -> Iterator[str]:
    """Decode and prefill of a model, in FP8."""
    spec = PRESETS[name]
    text = spec.text.model_copy(update={"layers": layers or spec.text.layers})
    spec = ModelSpec(name=name, provenance="custom", dtype="bf16", text=text)
    start = time.perf_counter()
    session, size = opened(spec, rank)
    torch.cuda.synchronize()
    title = f"{name}, {text.layers} layers, {rank.count} GPU{'s' * (rank.count > 1)}"
    took = time.perf_counter() - start
    yield f"{title}: {size / 1e9:.2f} GB of weights each; ready in {took:.1f} s"
    for batch in (1, 8, 64):
        took, tokens, chosen = decode_ms(session, batch)
        read = moec.plan(spec, "fp8", context=CONTEXT, batch=batch).decode_read_bytes / rank.count
        agree = "equal" if slowest(tokens) == -slowest(-tokens) else "DIFFERENT"
        yield (
            f"{title}: decode, batch {batch:2d}, 1k: {took:6.3f} ms, "
            f"{100 * read / took * 1e3 / copy:.0f} % of the copy; tokens {agree}; "
            f"{chosen:.1f} of {text.experts.count} experts a layer"
        )
    took = prefill_ms(session, 8192)
    peak = torch.cuda.max_memory_allocated() / 1e9
    yield f"{title}: prefill of 8,192: {took:.1f} ms; peak {peak:.1f} GB"
    planned = moec.plan(spec, "fp8", context=CONTEXT, gpus=rank.count)
    full = moec.plan(spec, "fp8", context=2**20, gpus=rank.count, device="h200")
    needed = (full.weights_bytes + full.cache_bytes) / 1e9
    yield (
        f"{title}: weights of {size / 1e9:.2f} GB, planned {planned.weights_bytes / 1e9:.2f}; with "
        f"a context of 1,048,576 tokens {needed:.1f} GB planned, which an H200 "
        f"{'holds' if full.fits else 'does not hold'}"
    )


def proof(gpus: int) -> None:
    """`moec validate` of the trained example, and of two layers of Scout's widths."""
    text = PRESETS["scout"].text
    experts = text.experts.model_copy(update={"count": 4})
    sizes = {"layers": 2, "vocab": 4096, "chunk": 64, "experts": experts}
    kinds = {"attention": "LG", "rope": "RN", "qk_norm": "Q-", "temperature": "-T", "ffn": "MM"}
    text = text.model_copy(update=sizes | kinds)
    two = ModelSpec(name="two", provenance="custom", dtype="bf16", text=text)
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "wide"
        write_random_checkpoint(two, wide, seed=1)
        for name, checkpoint in (
            ("a small model", small(gpus, Path(folder) / "small")),
            ("two layers of Scout's widths", wide),
        ):
            path = moec.export(checkpoint, target="torch", out=Path(folder) / "art").path
            start = time.perf_counter()
            report = moec.validate(path, device="cuda", gpus=gpus, tokens=160)
            took = time.perf_counter() - start
            said = "PASSED" if report.passed else f"FAILED: {report.first_divergence}"
            print(f"{name}, {report.engine}, moec validate: {said}, in {took:.0f} s", flush=True)
            for check in report.checks:
                print(f"    {check}", flush=True)
            shutil.rmtree(path)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--gpus", type=int, default=2)
    arguments.add_argument("--parts", default="sums,tokens,scout,maverick,proof")
    arguments.add_argument("--vllm-python", help="the Python that has vLLM")
    arguments.add_argument("--layers", type=int, default=0, help="of each model; 0: as above")
    given = arguments.parse_args()
    rank = started_as()
    if rank.count == 1 and given.gpus > 1:
        need_gpu("benchmarks/several_gpus.py")
        start(given)
        return
    if rank.count > 1:
        join("cuda")
    copy = copy_rate()
    say(
        rank,
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy / 1e12:.2f} TB/s",
    )
    rows: dict[str, Callable[[], Iterator[str]]] = {
        "sums": lambda: sums(rank) if rank.count > 1 else iter(()),
        "tokens": lambda: tokens(rank) if rank.count > 1 else iter(()),
        "scout": lambda: model("scout", given.layers, rank, copy),
        "maverick": lambda: model(
            "maverick", given.layers or (12 if rank.count < 4 else 0), rank, copy
        ),
        "proof": lambda: iter(()),  # it starts ranks of its own
    }
    for part in given.parts.split(","):
        for line in rows[part]():
            say(rank, line)
        gc.collect()
        torch.cuda.empty_cache()
    if dist.is_initialized():
        gc.collect()  # NCCL waits for CUDA graphs that use it
        dist.destroy_process_group()


def start(given: Any) -> None:
    """Run this command on one GPU, then on all, and vLLM on all if it is there."""
    command = [sys.executable, __file__, "--layers", str(given.layers)]
    if "scout" in given.parts:
        subprocess.run([*command, "--gpus", "1", "--parts", "scout"], check=True)
    many = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(given.gpus)]
    own = ["--gpus", str(given.gpus), "--parts", given.parts]
    subprocess.run([*many, *command[1:], *own], check=True)
    if "proof" in given.parts:
        proof(given.gpus)
    if given.vllm_python:
        python = shlex.split(given.vllm_python)
        need_vllm(python)
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder)
            (at / "config.json").write_text(json.dumps(vllm_config()))
            file, script = at / "vllm.json", str(Path(__file__).parent / "vllm_decoder.py")
            found = measured([*python, script, folder, str(file), "--gpus", str(given.gpus)], file)
        for row in found["rows"]:
            print(
                f"vLLM {found['vllm']}, {given.gpus} GPUs: {row['name']}: {row['us'] / 1e3:.2f} ms"
            )


if __name__ == "__main__":
    main()
