"""A checkpoint with seeded random weights, in the Hugging Face layout: for twins and benchmarks."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from moec.spec.config_json import write_config
from moec.spec.model import ModelSpec
from moec.weights.name_map import Row, rows
from moec.weights.view import TORCH_DTYPES


def write_random_checkpoint(
    spec: ModelSpec, folder: Path, seed: int = 0, device: str = "cpu"
) -> None:
    """Write `config.json` and `model.safetensors` of `spec` to `folder`, drawn on `device`.

    The scale keeps activations near 1 and router logits well apart, so that an error anywhere shows
    in the output and no expert is chosen by a rounding error.
    """
    generator = torch.Generator(device).manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        row.key: _draw(row, generator).to(TORCH_DTYPES[spec.dtype]).cpu() for row in rows(spec)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(write_config(spec), indent=2))


def _draw(row: Row, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(row.shape, generator=generator, device=generator.device)
    if row.parameter.endswith(("norm.weight", "vision.pre.weight", "vision.post.weight")):
        return 1 + 0.1 * noise
    if row.parameter.endswith("bias") or len(row.shape) == 1:
        return 0.1 * noise
    # Fused experts are [expert, in, out], linear weights [out, in].
    fan_in = row.shape[-2] if len(row.shape) == 3 else row.shape[-1]
    gain = {"embed.weight": math.sqrt(fan_in), "router.weight": 2.0}
    scale = next((g for end, g in gain.items() if row.parameter.endswith(end)), 1.0)
    return noise * scale / math.sqrt(fan_in)
