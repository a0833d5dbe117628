"""Write a checkpoint of seeded random weights, for reduced-size models and benchmarks."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moec.spec import names
from moec.spec.hf.config import write_config
from moec.spec.hf.names import keys
from moec.spec.model import ModelSpec
from moec.spec.parameters import parameters
from moec.spec.scheme import LARGEST
from moec.spec.tensors import quantized, tensors
from moec.weights import fp8
from moec.weights.int4.quantise import in_words, quantise
from moec.weights.view import STORED, TORCH_DTYPES

#: the magnitude that static scales of random weights cover; very few inputs are larger
LARGEST_INPUT = 6.0


def write_random_checkpoint(
    spec: ModelSpec, folder: Path, seed: int = 0, device: str = "cpu"
) -> None:
    """Write `config.json` and `model.safetensors` of `spec`, with random weights, to `folder`.

    The weights are drawn on `device`. Their size keeps activations near 1, so that an error
    anywhere shows in the output. It keeps router logits well apart, so that a rounding error does
    not change the chosen expert. If `spec` has a scheme, the same weights are quantised by it.
    """
    generator = torch.Generator(device).manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    theirs, found = keys(spec), dict[str, Tensor]()
    for name, tensor in _draw_all(spec, generator):
        found |= in_words(theirs[name], tensor.cpu())
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(write_config(spec), indent=2))


def _draw_all(spec: ModelSpec, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    rules = quantized(spec)
    for name, shape in parameters(spec).items():
        weight = _draw(name, shape, generator).to(TORCH_DTYPES[spec.stored(name)])
        if name not in rules and spec.separate_experts and len(shape) == 3:
            for expert, own in enumerate(weight):
                parts = names.separate(name, expert)
                for part, matrix in zip(parts, own.t().chunk(len(parts)), strict=True):
                    yield part, matrix.to(TORCH_DTYPES[spec.stored(part)]).contiguous()
        elif name not in rules:
            yield name, weight
        elif spec.scheme and spec.scheme.separate_experts and len(shape) == 3:
            for expert, own in enumerate(weight):
                parts = names.separate(name, expert)
                for part, matrix in zip(parts, own.t().chunk(len(parts)), strict=True):
                    yield from _quantised(spec, part, matrix, rules[name].weight)
        else:
            yield from _quantised(spec, name, weight, rules[name].weight)
    for name, kind in tensors(spec).items():
        if names.is_input_scale(name) or names.is_cache_scale(name):
            dtype = STORED[kind.dtype]
            yield name, torch.full(kind.shape, LARGEST_INPUT / LARGEST, dtype=dtype)


def _quantised(
    spec: ModelSpec, name: str, weight: Tensor, grid: str
) -> Iterator[tuple[str, Tensor]]:
    """The quantised values and the scales of a weight [out, in] or [expert, in, out]."""
    assert spec.scheme is not None
    if spec.scheme.int4:
        scheme = spec.scheme
        yield from quantise(name, weight, grid, scheme.block, scheme.zero_points, scheme.scales)
        return
    block, stacked = spec.scheme.block, weight.dim() == 3
    along = {"channel": "column" if stacked else "row", "block": "block"}.get(grid, "all")
    matrices = list(weight.contiguous().cpu()) if stacked else [weight.contiguous().cpu()]
    sizes = torch.stack([fp8.magnitudes(matrix, along, block) for matrix in matrices])
    if grid == "tensor":
        sizes = sizes.amax().expand(len(matrices))
    scale = fp8.scales(sizes, STORED[spec.scheme.scales])
    values = torch.empty(weight.shape, dtype=STORED["fp8"])
    for matrix, own, out in zip(matrices, scale, values if stacked else [values], strict=True):
        fp8.quantise(matrix, own.float(), along, block, out)
    yield name, values
    yield names.scale_of(name), (scale if stacked and grid != "tensor" else scale[0]).contiguous()


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if names.is_norm(name):
        return 1 + 0.1 * noise
    if names.is_bias(name) or len(shape) == 1:
        return 0.1 * noise
    # Stacked experts are [expert, in, out], linear weights [out, in].
    fan_in = shape[-2] if len(shape) == 3 else shape[-1]
    scale = 2.0 if names.is_router(name) else 1.0
    if name == names.EMBED_WEIGHT:
        scale = math.sqrt(fan_in)
    return noise * scale / math.sqrt(fan_in)
