"""The decode MoE kernels on torch tensors: scratch once, then a call is four or five launches."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moec.kernels.launches.launch import Tiles
from moec.kernels.launches.stream import few_moe
from moec.kernels.sizes import Sizes
from moec.kernels.torch.launch import architecture, buffers, run


class DecodeMoe:
    """One layer for a fixed number of tokens.

    `weights`: router bf16 [E, D]; gate_up E4M3 [E + 1, 2F, D] and down [E + 1, D, F], the shared
    expert last, with gate_up_scale [E + 1, 2F] and down_scale [E + 1, D] in float32. Calls may be
    captured in a CUDA graph.
    """

    def __init__(
        self,
        sizes: Sizes,
        tokens: int,
        weights: Mapping[str, Tensor],
        tiles: Tiles | None = None,
        eps: float | None = None,
        combine: bool = True,
    ) -> None:
        device = weights["gate_up"].device
        self.launches, written = few_moe(sizes, tokens, architecture(device), tiles, eps, combine)
        self.values: dict[str, Any] = {**buffers(written, device), **weights, "tokens": tokens}
        self.result = "out" if combine else "parts"

    def __call__(self, x: Tensor, skip: Tensor | None = None, gain: Tensor | None = None) -> Tensor:
        """x bf16 [tokens, D] -> bf16 [tokens, D], which the next call overwrites.

        Without `combine`, the float32 parts [n, tokens, D] whose sum that is. With an `eps`, of the
        RMS norm of x + skip times gain; that sum is then in `values`.
        """
        for index in range(len(self.launches)):
            self.launch(index, x, skip, gain)
        out: Tensor = self.values[self.result]
        return out

    def launch(
        self, index: int, x: Tensor, skip: Tensor | None = None, gain: Tensor | None = None
    ) -> None:
        """One of the launches by itself, on what the ones before have left."""
        given = {"x": x, "skip": x if skip is None else skip, "gain": x if gain is None else gain}
        run(self.launches[index], {**self.values, **given})
