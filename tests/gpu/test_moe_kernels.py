"""The FP8 MoE kernels on a GPU against their twin, for every number of tokens that they take."""

import pytest
import torch

from moec.kernels import twin
from moec.kernels.launch import MOST_TOKENS, Sizes
from moec.kernels.torch_moe import DecodeMoe


@pytest.mark.parametrize("experts", [16, 3])
def test_every_number_of_tokens(experts: int) -> None:
    from benchmarks.moe_kernels import random_weights

    sizes = Sizes(dim=512, hidden=1024, experts=experts)
    weights = random_weights(sizes)
    for tokens in range(1, MOST_TOKENS + 1):
        x = torch.randn(tokens, sizes.dim, device="cuda").bfloat16()
        layer = DecodeMoe(sizes, tokens, weights)
        found = layer(x).clone()
        expected = twin.decode_moe(weights, x)
        assert (found.float() - expected).norm() <= 2e-2 * expected.norm()
        layer(torch.randn_like(x))
        assert torch.equal(layer(x), found)
