"""The FP8 MoE kernels on a GPU against the eager op, for every number of tokens that they take."""

import pytest
import torch

from moec.graph_builder import ops
from moec.graph_builder.ops.operands import arguments
from moec.kernels.sizes import MOST_TOKENS, RoutedSizes, Sizes
from moec.kernels.torch.moe import DecodeMoe
from moec.spec.parts.routing import Routing

#: every score and choice, with and without groups, blocks and shared experts
ROUTED = {
    "all": RoutedSizes(512, 384, 48, 8, 0, Routing(score="softmax", weighed="output")),
    "chosen": RoutedSizes(512, 256, 8, 2, 2, Routing(score="softmax_of_chosen", weighed="output")),
    "biased": RoutedSizes(
        512, 256, 64, 6, 2,
        Routing(score="sigmoid", choice="scores", bias=True, normalise=True, factor=2.5,
                weighed="output"),
    ),
    "groups of logits": RoutedSizes(
        512, 256, 64, 8, 0,
        Routing(score="softmax", groups=8, kept_groups=4, normalise=True, weighed="output"),
    ),
    "groups": RoutedSizes(
        768, 256, 256, 8, 1,
        Routing(choice="scores", bias=True, groups=8, kept_groups=4, normalise=True, factor=2.5,
                weighed="output"),
        128,
    ),
    "odd groups": RoutedSizes(
        256, 128, 15, 4, 0,
        Routing(score="softmax", choice="scores", bias=True, groups=3, kept_groups=2,
                weighed="output"),
        128,
    ),
}  # fmt: skip


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
        best = (x.float() @ weights["router"].float().t()).bfloat16().topk(2).values
        clear = best[:, 0] > best[:, 1]  # a token whose best experts tie may go to either
        assert error(found[clear], expected[clear]) <= 2e-2 or not clear.any()
        layer(torch.randn_like(x))
        assert torch.equal(layer(x), found)


@pytest.mark.parametrize("name", ROUTED)
def test_every_routing(name: str) -> None:
    from benchmarks.moe_kernels import (
        error,
        error_of_routed,
        operands,
        random_weights,
        without_ties,
    )
    from moec.kernels.torch.routed import RoutedMoe

    sizes = ROUTED[name]
    weights = random_weights(sizes)
    for tokens in (*range(1, MOST_TOKENS + 1), 65, 200, 257, 1500):
        layer, ties = RoutedMoe(sizes, weights), True
        while ties:
            x = torch.randn(tokens, sizes.dim, device="cuda").bfloat16()
            values = layer.run(layer.values(x))
            logits = values["logits"].sum(0)
            ties = not without_ties(operands(sizes, weights, x), logits.bfloat16()).any()
        assert error(logits, x.float() @ weights["router"].float().t()) <= 1e-4
        assert error_of_routed(sizes, weights, values) <= 2e-2
        layer(torch.randn_like(x))
        assert torch.equal(layer(x), values["out"])


@pytest.mark.parametrize("name", ROUTED)
def test_the_op_on_a_gpu_runs_the_kernels(name: str) -> None:
    from benchmarks.moe_kernels import operands, random_weights
    from moec.kernels.torch.ops import register
    from moec.kernels.torch.routed import RoutedMoe

    register()
    sizes = ROUTED[name]
    weights = random_weights(sizes)
    x = torch.randn(7, sizes.dim, device="cuda").bfloat16()
    found = ops.routed_layer.target(*arguments(operands(sizes, weights, x)))
    assert torch.equal(found, RoutedMoe(sizes, weights)(x))
