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
#: precision -> largest relative change of perplexity: those of tiny-scout
LIMITS = {"fp32": 1e-4, "int8": 0.01, "int4": 0.06}


def _perplexity(logits: Tensor, windows: Tensor) -> float:
    loss = functional.cross_entropy(logits.float().transpose(1, 2), windows[:, 1:])
    return float(loss.exp())


@pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < QUANTIZED_FROM,
    reason="onnxruntime is too old for quantised experts",
)
@pytest.mark.parametrize("name", ["tiny-olmoe", "tiny-deepseek-v3"])
def test_perplexity_of_each_precision(name: str, golden: dict[str, Tensor], tmp_path: Path) -> None:
    windows = golden["eval_ids"][::4]
    model = AutoModelForCausalLM.from_pretrained(TRAINED / name, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = _perplexity(model(input_ids=windows[:, :-1]).logits, windows)
    assert expected < 1000, "it is trained: a model that guesses has 4096"
    for precision, limit in LIMITS.items():
        out = tmp_path / precision
        moec.export(TRAINED / name, target="ort", precision=precision, out=out)
        logits = moec.open_session(out).logits(windows[:, :-1])
        found = _perplexity(torch.as_tensor(logits), windows)
        print(f"{name}, {precision}: {found:.4f}, {100 * (found / expected - 1):+.3f} %")
        assert abs(found / expected - 1) < limit, precision
