"""The decode MoE kernels on torch tensors: scratch once, then a call is three launches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moec.kernels.launch import Sizes, Tiles, decode_moe, scratch, tiles_for

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "fp8e4nv": torch.float8_e4m3fn,
}


class DecodeMoe:
    """One layer for a fixed number of tokens.

    `weights`: router bf16 [E, D]; gate_up E4M3 [E + 1, 2F, D] and down [E + 1, D, F], the shared
    expert last, with gate_up_scale [E + 1, 2F] and down_scale [E + 1, D] in float32. Calls may be
    captured in a CUDA graph; layers that run one after the other may share scratch.
    """

    def __init__(
        self,
        sizes: Sizes,
        tokens: int,
        weights: Mapping[str, Tensor],
        tiles: Tiles | None = None,
        overlap: bool | None = None,
    ) -> None:
        device = weights["gate_up"].device
        if overlap is None:
            overlap = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self.tokens, tiles = tokens, tiles or tiles_for(tokens)
        self.launches = decode_moe(sizes, tokens, tiles, overlap)
        self.values: dict[str, Any] = {
            name: torch.zeros(shape, dtype=_DTYPES[kind], device=device)
            for name, (shape, kind) in scratch(sizes, tokens, tiles).items()
        }
        self.values |= {**weights, "tokens": tokens}

    def __call__(self, x: Tensor) -> Tensor:
        """x bf16 [tokens, D] -> bf16 [tokens, D], which the next call overwrites."""
        for index in range(len(self.launches)):
            self.launch(index, x)
        out: Tensor = self.values["out"]
        return out

    def launch(self, index: int, x: Tensor) -> None:
        """One of the launches by itself, on what the ones before have left."""
        each, values = self.launches[index], {**self.values, "x": x}
        each.kernel[each.grid](
            *(values[name] for name in each.arguments), **each.constants,
            num_warps=each.warps, num_stages=each.stages, **each.options,
        )  # fmt: skip
