"""Export transformers' Llama 4 with `torch.onnx.export`, without weights: the peer of a full build.

The peer has every advantage: no KV cache, one static shape, no weights to place and no check of the
result. Its optimizer is off, because constant folding fails without weights. The released model
cannot be exported, because its RoPE uses complex numbers, which ONNX does not have. The module
replaces that RoPE by one in real numbers.
"""

import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moec.runtime.bench.torchvision_ops import declare_torchvision_ops
from moec.spec.hf.config import write_config
from moec.spec.model import ModelSpec
from moec.spec.parameters import text_parameters
from moec.spec.presets import PRESETS

declare_torchvision_ops()
from transformers import AutoModelForCausalLM, Llama4TextConfig  # noqa: E402
from transformers.models.llama4 import modeling_llama4  # noqa: E402

TOKENS = 128


def export(variant: str, out: str) -> dict[str, float]:
    """Write the preset `variant` to `out`; return the seconds to a torch graph, and on to ONNX."""
    warnings.simplefilter("ignore")
    use_real_rope()
    _warm_up()
    spec = PRESETS[variant]
    start = time.perf_counter()
    # Fake tensors have a shape and a type but no memory, so that 217 GB of them fit anywhere.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(spec, torch.bfloat16)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    _refuse_other_model(model, spec)
    program = torch.export.export(model, (ids,), strict=False)
    graph = time.perf_counter()
    onnx = torch.onnx.export(program, (ids,), dynamo=True, optimize=False, verbose=False)
    onnx.save(out, include_initializers=False)
    return {"graph_s": graph - start, "onnx_s": time.perf_counter() - graph}


def build(spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    """The decoder of `spec` as a model of transformers."""
    config = write_config(spec.model_copy(update={"vision": None}))
    for field in ("architectures", "model_type", "torch_dtype"):
        del config[field]
    model: nn.Module = AutoModelForCausalLM.from_config(
        Llama4TextConfig(**config, use_cache=False), dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval()


def use_real_rope() -> None:
    """Replace the complex RoPE of transformers by the same rotation in real numbers."""
    modeling_llama4.Llama4TextRotaryEmbedding.forward = _rope_table
    modeling_llama4.apply_rotary_emb = _rotate


def _rope_table(self: Any, x: Tensor, position_ids: Tensor) -> Tensor:
    """Cosines and sines of positions [B, S], as [B, S, 1, dim / 2, 2]."""
    angles = position_ids[..., None, None].float() * self.inv_freq.float()
    return torch.stack([angles.cos(), angles.sin()], -1) * self.attention_scaling


def _rotate(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = table.unbind(-1)

    def rotate(x: Tensor) -> Tensor:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return pairs.flatten(-2).type_as(x)

    return rotate(q), rotate(k)


def _warm_up() -> None:
    """Export one layer, so that the time does not include what torch imports at first use."""
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),), strict=False)
    torch.onnx.export(program, (torch.zeros(1, 2),), dynamo=True, optimize=False, verbose=False)


def _refuse_other_model(model: nn.Module, spec: ModelSpec) -> None:
    ours = sum(torch.Size(shape).numel() for shape in text_parameters(spec).values())
    theirs = sum(weight.numel() for weight in model.parameters())
    if ours != theirs:
        raise ValueError(f"transformers builds {theirs} parameters of {spec.name}, moec {ours}")
