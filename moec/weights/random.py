"""A checkpoint with seeded random weights, in the Hugging Face layout: for twins and benchmarks."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moec.spec.hf.config_writer import write_config
from moec.spec.hf.names import keys
from moec.spec.model import ModelSpec
from moec.spec.parameters import parameters
from moec.spec.scheme import LARGEST
from moec.spec.tensors import quantized, scale_of, separate, tensors
from moec.weights import fp8
from moec.weights.view import STORED, TORCH_DTYPES

#: what a static scale of random weights is for: hardly an input is larger
LARGEST_INPUT = 6.0


def write_random_checkpoint(
    spec: ModelSpec, folder: Path, seed: int = 0, device: str = "cpu"
) -> None:
    """Write `config.json` and `model.safetensors` of `spec` to `folder`, drawn on `device`.

    The scale keeps activations near 1 and router logits well apart, so that an error anywhere shows
    in the output and no expert is chosen by a rounding error. With a scheme, the weights that it
    names are the same ones in FP8.
    """
    generator = torch.Generator(device).manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    theirs, found = keys(spec), dict[str, Tensor]()
    for name, tensor in _draw_all(spec, generator):
        found[theirs[name]] = tensor.cpu()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(write_config(spec), indent=2))


def _draw_all(spec: ModelSpec, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    rules = quantized(spec)
    for name, shape in parameters(spec).items():
        weight = _draw(name, shape, generator).to(TORCH_DTYPES[spec.dtype])
        if name not in rules:
            yield name, weight
        elif spec.scheme and spec.scheme.separate_experts and len(shape) == 3:
            for expert, fused in enumerate(weight):
                parts = separate(name, expert)
                for part, matrix in zip(parts, fused.t().chunk(len(parts)), strict=True):
                    yield from _narrow(spec, part, matrix, rules[name].weight)
        else:
            yield from _narrow(spec, name, weight, rules[name].weight)
    for name, kind in tensors(spec).items():
        if name.endswith((".input_scale", "_input_scale", ".k_scale", ".v_scale")):
            dtype = STORED[kind.dtype]
            yield name, torch.full(kind.shape, LARGEST_INPUT / LARGEST, dtype=dtype)


def _narrow(spec: ModelSpec, name: str, weight: Tensor, grid: str) -> Iterator[tuple[str, Tensor]]:
    """Codes and scales of a weight [out, in] or [expert, in, out]."""
    assert spec.scheme is not None
    block, fused = spec.scheme.block, weight.dim() == 3
    along = {"channel": "column" if fused else "row", "block": "block"}.get(grid, "all")
    matrices = list(weight.contiguous().cpu()) if fused else [weight.contiguous().cpu()]
    sizes = torch.stack([fp8.magnitudes(matrix, along, block) for matrix in matrices])
    if grid == "tensor":
        sizes = sizes.amax().expand(len(matrices))
    scale = fp8.scales(sizes, STORED[spec.scheme.scales])
    codes = torch.empty(weight.shape, dtype=STORED["fp8"])
    for matrix, mine, out in zip(matrices, scale, codes if fused else [codes], strict=True):
        fp8.codes(matrix, mine.float(), along, block, out)
    yield name, codes
    yield scale_of(name), (scale if fused and grid != "tensor" else scale[0]).contiguous()


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith(("norm.weight", "vision.pre.weight", "vision.post.weight")):
        return 1 + 0.1 * noise
    if name.endswith("bias") or len(shape) == 1:
        return 0.1 * noise
    # Fused experts are [expert, in, out], linear weights [out, in].
    fan_in = shape[-2] if len(shape) == 3 else shape[-1]
    gain = {"embed.weight": math.sqrt(fan_in), "router.weight": 2.0}
    scale = next((g for end, g in gain.items() if name.endswith(end)), 1.0)
    return noise * scale / math.sqrt(fan_in)
