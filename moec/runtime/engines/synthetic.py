"""Random weights for programs of target `torch`, drawn where they will be used.

A full-size model then runs without a checkpoint: to measure it, not to say anything.
"""

import torch
from torch import Tensor

from moec.spec.model import ModelSpec
from moec.spec.scheme import LARGEST
from moec.spec.tensors import scale_of
from moec.weights.joined import joined_tensors
from moec.weights.view import STORED


def synthetic(
    spec: ModelSpec, seed: int, device: str, precision: str = "bf16", part: str = "model"
) -> dict[str, Tensor]:
    """Every joined tensor of a part of `spec` by name, on `device`; the same for the same seed.

    Products keep the size of what goes through them, and router logits lie well apart. Codes have a
    scale for each output, as if they had been quantised from normal values.
    """
    generator = torch.Generator(device).manual_seed(seed)
    kinds = joined_tensors(spec, precision, part)
    found: dict[str, Tensor] = {}
    for name, kind in kinds.items():
        if name in found:
            continue
        if kind.dtype != "fp8":
            found[name] = _wide(name, kind.shape, generator).to(STORED[kind.dtype])
            continue
        codes = torch.empty(kind.shape, dtype=STORED["fp8"], device=device)
        scale = torch.empty(kind.shape[:-1], device=device)
        matrices = zip(codes, scale, strict=True) if codes.dim() == 3 else [(codes, scale)]
        for rows, each in matrices:
            wide = torch.randn(rows.shape, generator=generator, device=device)
            each.copy_(wide.abs().amax(1) / LARGEST)
            rows.copy_(wide.div_(each[:, None]))
            each.mul_(rows.shape[1] ** -0.5)
        found |= {name: codes, scale_of(name): scale}
    return found


def _wide(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 1:
        return 0.1 * noise + ("norm" in name)
    gain = {"embed.weight": shape[-1] ** 0.5, "router.weight": 2.0}
    size = next((g for end, g in gain.items() if name.endswith(end)), 1.0)
    return noise.mul_(size * float(shape[-1]) ** -0.5)
