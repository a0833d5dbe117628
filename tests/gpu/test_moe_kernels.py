"""The FP8 MoE kernels on a GPU against the eager op, for every number of tokens that they take."""

import pytest
import torch

from moec.graph_builder import ops
from moec.kernels.sizes import MOST_TOKENS, Sizes
from moec.kernels.torch.moe import DecodeMoe


@pytest.mark.parametrize("experts", [16, 3])
def test_every_number_of_tokens(experts: int) -> None:
    from benchmarks.moe_kernels import error, random_weights

    sizes = Sizes(dim=512, hidden=1024, experts=experts)
    weights = random_weights(sizes)
    for tokens in range(1, MOST_TOKENS + 1):
        x = torch.randn(tokens, sizes.dim, device="cuda").bfloat16()
        layer = DecodeMoe(sizes, weights)
        found = layer(x)
        expected = ops.moe_layer.eager(x, *weights.values())
        assert error(found, expected) <= 2e-2
        layer(torch.randn_like(x))
        assert torch.equal(layer(x), found)
