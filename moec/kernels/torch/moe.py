"""The decode MoE kernels on torch tensors: one layer for 1 to 64 tokens."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from moec.kernels.launches.decode import Tiles
from moec.kernels.launches.few_tokens import few_moe
from moec.kernels.launches.launch import Launch
from moec.kernels.sizes import Sizes
from moec.kernels.torch.launch import architecture, buffers, run

#: what is launched for sizes, tokens, an architecture and options, described once for all layers
_launched = cache(few_moe)


class DecodeMoe:
    """One layer. Every call has scratch of its own, and may be captured in a CUDA graph.

    `weights`: router bf16 [E, D]; gate_up E4M3 [E + 1, 2F, D] and down [E + 1, D, F], the shared
    expert last, with gate_up_scale [E + 1, 2F] and down_scale [E + 1, D] in float32. With `eps` the
    layer's input is the RMS norm of x + skip, times gain. Without `combine` its result is the
    partial sums, which the next kernel has to add up.
    """

    def __init__(
        self,
        sizes: Sizes,
        weights: Mapping[str, Tensor],
        tiles: Tiles | None = None,
        eps: float | None = None,
        combine: bool = True,
    ) -> None:
        self.weights, self.device = weights, weights["gate_up"].device
        self.sizes, self.options = sizes, (tiles, eps, combine)

    def __call__(self, x: Tensor) -> Tensor:
        """x bf16 [tokens, D] -> bf16 [tokens, D]; for a layer without `eps`, with `combine`."""
        out: Tensor = self.run(self.values(x))["out"]
        return out

    def launches(self, tokens: int) -> tuple[Launch, ...]:
        """The launches of a call, in order."""
        return _launched(self.sizes, tokens, architecture(self.device), *self.options)[0]

    def values(
        self, x: Tensor, skip: Tensor | None = None, gain: Tensor | None = None
    ) -> dict[str, Any]:
        """The arguments of all launches by name, with new scratch."""
        written = _launched(self.sizes, len(x), architecture(self.device), *self.options)[1]
        given = {"x": x, "skip": x if skip is None else skip, "gain": x if gain is None else gain}
        return {**buffers(written, self.device), **self.weights, **given, "tokens": len(x)}

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        """Run all launches on `values`, and return them.

        Then "out" is bf16 [tokens, D]; without `combine` "parts" is float32 [n, tokens, D], the
        partial sums of that; and with `eps` "total" is x + skip.
        """
        for launch in self.launches(values["tokens"]):
            run(launch, values)
        return values
