"""Draw random weights for programs of target `torch`, directly on the device.

With them a full-size model runs without a checkpoint, so that it can be measured.
"""

import torch
from torch import Tensor

from moec.spec.model import ModelSpec
from moec.spec.names import EMBED_WEIGHT, is_router, scale_of
from moec.spec.scheme import LARGEST
from moec.spec.sharding import ALONE, Rank, cut_of, local
from moec.weights.joined import FUSED, PROGRAM_TENSORS
from moec.weights.view import STORED


def synthetic(
    spec: ModelSpec,
    seed: int,
    device: str,
    precision: str = "bf16",
    part: str = "model",
    rank: Rank = ALONE,
    dialect: str = FUSED,
) -> dict[str, Tensor]:
    """Draw every tensor of a part of a program of `spec`, by name, on `device`.

    A `rank` draws its part. What all ranks have is the same on all of them; the parts are not those
    of what a process alone would draw.

    The same seed gives the same weights. Linear layers keep the magnitude of their inputs, and
    router logits lie well apart. Quantised values have scales for outputs or blocks, as if they had
    been quantised from normally distributed weights.
    """
    same, mine = (torch.Generator(device) for _ in range(2))
    same.manual_seed(seed)
    mine.manual_seed(seed + 1 + rank.index)
    kinds = PROGRAM_TENSORS[dialect](local(spec, rank), precision, part)
    parted = rank.count > 1 and {
        name for name, each in kinds.items() if any(map(cut_of, each.sources))
    }
    found: dict[str, Tensor] = {}
    for name, kind in kinds.items():
        if name in found:
            continue
        generator = mine if parted and name in parted else same
        if kind.dtype != "fp8":
            found[name] = _unquantised(name, kind.shape, generator).to(STORED[kind.dtype])
            continue
        values = torch.empty(kind.shape, dtype=STORED["fp8"], device=device)
        scale = torch.empty(kinds[scale_of(name)].shape, device=device)
        matrices = zip(values, scale, strict=True) if values.dim() == 3 else [(values, scale)]
        for rows, each in matrices:
            down, across = (*each.shape, 1)[:2]
            wide = torch.randn(rows.shape, generator=generator, device=device)
            blocks = wide.view(down, -1, across, rows.shape[1] // across)
            most = blocks.abs().amax((1, 3)) / LARGEST
            blocks.div_(most[:, None, :, None])
            rows.copy_(wide)
            each.copy_(most.mul_(rows.shape[1] ** -0.5).view(each.shape))
        found |= {name: values, scale_of(name): scale}
    return found


def _unquantised(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 1:
        return 0.1 * noise + ("norm" in name)
    size = 2.0 if is_router(name) else 1.0
    if name == EMBED_WEIGHT:
        size = shape[-1] ** 0.5
    return noise.mul_(size * float(shape[-1]) ** -0.5)
