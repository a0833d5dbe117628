"""Plain programs of target torch on a GPU: a small random model of every family."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import moec
from moec.graph_builder import ops
from moec.kernels.sizes import RoutedSizes
from moec.kernels.torch.routed import RoutedMoe
from moec.runtime.session import Session
from moec.spec.hf.quantization import read_scheme
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.families import CASES
from tests.proofs import assert_passed

#: the largest error of the median token: roundings differ, and a few near ties of routers
NOISE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 6e-2, "fp8": 1e-1}


def _sessions(case: str, precision: str, folder: Path) -> tuple[Session, Session]:
    write_random_checkpoint(CASES[case], folder / "weights", seed=11)
    out = folder / "art"
    moec.export(folder / "weights", target="torch", precision=precision, out=out)
    return moec.open_session(out, device="cuda"), moec.open_session(out)


def _errors(found: Tensor, expected: Tensor) -> Tensor:
    """Relative errors of the logits [..., vocab]."""
    found = found.float().cpu()
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize("precision", NOISE)
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_the_logits_of_a_cpu(case: str, precision: str, tmp_path: Path) -> None:
    """Three rows of different length in one call, then eight tokens of each through caches."""
    gpu, cpu = _sessions(case, precision, tmp_path)
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    rows = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (33, 9, 20)]
    whole = [session.logits(rows) for session in (gpu, cpu)]
    errors = [
        _errors(*(torch.as_tensor(each[i, : len(row)]) for each in whole))
        for i, row in enumerate(rows)
    ]
    results = []
    steps = torch.randint(0, 256, (8, len(rows)), generator=generator)
    for session in (gpu, cpu):
        logits, cache = session.prefill(rows, capacity=48)
        results.append([logits.cpu(), *(session.decode(each, cache).cpu() for each in steps)])
    errors.append(_errors(*map(torch.stack, results)).flatten())
    error = torch.cat(errors)
    print(f"{case}, {precision}: median {error.median():.1e}, largest {error.max():.1e}")
    assert error.median() < NOISE[precision]
    if precision == "fp32":
        assert error.max() < 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("case", ["olmoe", "mixtral", "deepseek-moe"])
def test_the_proof_passes(case: str, precision: str, tmp_path: Path) -> None:
    write_random_checkpoint(CASES[case], tmp_path / "weights", seed=5)
    out = tmp_path / "art"
    moec.export(tmp_path / "weights", target="torch", precision=precision, out=out)
    assert_passed(moec.validate(out, device="cuda"))


@pytest.mark.parametrize("case", ["qwen3", "mixtral window, tied", "deepseek-v3"])
def test_steps_are_cuda_graphs(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, _ = _sessions(case, "bf16", tmp_path)
    replayed, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(graph), replay(graph))
    )
    gpu.generate(torch.arange(3, 20)[None], max_new_tokens=8, stop=())
    assert len(replayed) > 4


def test_generation_that_runs_ahead_is_one_that_waits(tmp_path: Path) -> None:
    gpu, _ = _sessions("qwen3", "bf16", tmp_path)
    rows = [torch.randint(0, 256, (n,)).tolist() for n in (20, 7, 33)]
    free = gpu.generate(rows, max_new_tokens=12, stop=())
    logits, cache = gpu.prefill(rows, capacity=64)
    waited = []
    for _ in range(12):
        waited.append(logits.argmax(-1).cpu())
        logits = gpu.decode(waited[-1], cache)
    new = [row[n : n + 12].tolist() for row, n in zip(free, (20, 7, 33), strict=True)]
    assert new == torch.stack(waited, 1).tolist()


def _layer(spec: ModelSpec, tokens: int) -> tuple[list[Tensor | None], tuple[object, ...]]:
    """Operands of `routed_layer` in float32: tensors, and how it routes."""
    experts = spec.text.experts
    assert experts
    how, dim, hidden, count = experts.routing, spec.text.dim, experts.hidden, experts.count

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape) * shape[-1] ** -0.5

    bias = 0.1 * torch.randn(count) if how.bias else None
    x, router = torch.randn(tokens, dim), 2 * draw(count, dim)
    weights = draw(count, 2 * hidden, dim), None, draw(count, dim, hidden), None
    says = experts.top_k, how.score, how.choice, how.groups, how.kept_groups
    return [x, router, bias, *weights], (*says, how.normalise, how.factor, how.weighed, 0)


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("case", ["qwen3", "mixtral", "deepseek-v3"])
def test_wide_layers_ask_the_gpu_for_nothing(case: str, tokens: int) -> None:
    spec = reduced(CASES[case], 2, block=128)
    given, how = _layer(spec, tokens)
    here = [None if each is None else each.cuda().bfloat16() for each in given]
    expected = ops.routed_layer.eager(*(None if x is None else x.float() for x in here), *how)
    ops.routed_layer.eager(*here, *how)  # what libraries set up at first
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.routed_layer.eager(*here, *how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert _errors(found.cpu(), expected.cpu()).median() < 2e-2


def test_block_fp8_in_place_runs_through_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek's own bytes and scales: experts are joined while they are loaded."""
    plain = reduced(CASES["deepseek-v3"], 3, block=128)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    config |= {"weight_block_size": [128, 128]}
    scheme = read_scheme(config, tmp_path / "config.json", plain)
    spec = plain.model_copy(update={"scheme": scheme})
    write_random_checkpoint(spec, tmp_path / "weights", seed=4)
    art = moec.export(tmp_path / "weights", target="torch", out=tmp_path / "art")
    assert art.manifest.weights.mode == "in-place"
    made = []
    of_kernels = RoutedMoe.__init__

    def seen(self: RoutedMoe, sizes: RoutedSizes, *rest: object) -> None:
        made.append(sizes.block)
        of_kernels(self, sizes, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RoutedMoe, "__init__", seen)
    rows = [torch.randint(0, 256, (n,)).tolist() for n in (33, 9, 20)]
    found, expected = (
        torch.as_tensor(moec.open_session(art.path, device=device).logits(rows))
        for device in ("cuda", "cpu")
    )
    assert set(made) == {128}
    assert _errors(found[0], expected[0]).median() < NOISE["fp8"]


@pytest.mark.parametrize("model", ["scout", "qwen3"])
def test_a_quantised_checkpoint_gives_the_bits_of_packed_weights(
    model: str, tmp_path: Path
) -> None:
    spec = reduced(PRESETS["scout"], 4, block=128, head_dim=64) if model == "scout" else None
    spec = spec or reduced(CASES["qwen3"], 3, block=128)
    write_random_checkpoint(spec.model_copy(update={"vision": None}), tmp_path / "wide", seed=3)
    fp8 = moec.quantize(tmp_path / "wide", "dynamic", tmp_path / "fp8").path
    ids = torch.arange(3, 60)[None]
    found = []
    for source, mode in ((fp8, "in-place"), (tmp_path / "wide", "pack")):
        art = moec.export(source, "torch", "fp8", tmp_path / mode)
        assert art.manifest.weights.mode == mode
        session = moec.open_session(art.path, device="cuda")
        logits, cache = session.prefill(ids, capacity=64)
        found.append([logits, session.decode(torch.tensor([5]), cache).clone()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
