"""Small trained models of other families: what 8 and 4 bits cost on target ort, in perplexity."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import moec
from moec.runtime.engines.ort import QUANTIZED_FROM

pytestmark = pytest.mark.full

TRAINED = Path(__file__).parents[1] / "trained"
#: target, precision -> largest relative change of perplexity: those of tiny-scout
LIMITS = {
    ("onnx", "fp32"): 1e-4,
    ("ort", "fp32"): 1e-4,
    ("ort", "int8"): 0.01,
    ("ort", "int4"): 0.06,
}
#: the smallest share of a layer's choices that goes to an expert; equal shares are an eighth
LEAST = 0.01


def _perplexity(logits: Tensor, windows: Tensor) -> float:
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp().item()


def _expected(folder: Path, windows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """transformers' logits, and the share of choices that each expert of each layer gets."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shares: list[Tensor] = []

    def see(_: torch.nn.Module, inputs: tuple[Tensor], out: tuple[Tensor, ...]) -> None:
        counts = out[2].flatten().bincount(minlength=8)
        shares.append(counts / counts.sum())

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(see)
    with torch.inference_mode():
        return model(input_ids=windows[:, :-1]).logits, shares


@pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < QUANTIZED_FROM,
    reason="onnxruntime is too old for quantised experts",
)
@pytest.mark.parametrize(("name", "layers"), [("tiny-olmoe", 3), ("tiny-deepseek-v3", 2)])
def test_perplexity_of_each_precision(
    name: str, layers: int, golden: dict[str, Tensor], tmp_path: Path
) -> None:
    logits, shares = _expected(TRAINED / name, golden["eval_ids"])
    windows = golden["eval_ids"][::4]
    expected = _perplexity(logits[::4], windows)
    assert expected < 1000, "it is trained: a model that guesses has 4096"
    assert len(shares) == layers
    assert all(each.min() > LEAST for each in shares), "its router leaves an expert aside"
    for (target, precision), limit in LIMITS.items():
        out = tmp_path / target / precision
        moec.export(TRAINED / name, target=target, precision=precision, out=out)
        logits = moec.open_session(out).logits(windows[:, :-1])
        found = _perplexity(torch.as_tensor(logits), windows)
        print(f"{name}, {target} {precision}: {found:.4f}, {100 * (found / expected - 1):+.3f} %")
        assert abs(found / expected - 1) < limit, (target, precision)
