"""The vision ops against torch's and transformers' statements of the same thing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import Llama4VisionConfig
from transformers.models.llama4.modeling_llama4 import (
    Llama4VisionRotaryEmbedding,
    pixel_shuffle,
    vision_apply_rotary_emb,
)

from moec.graph_builder import ops
from moec.spec.errors import MoecError


@given(
    tiles=st.integers(1, 3),
    channels=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    size=st.integers(1, 5),
)
def test_patches_are_those_of_unfold(
    tiles: int, channels: int, rows: int, columns: int, size: int
) -> None:
    pixels = torch.randn(tiles, channels, rows * size, columns * size)
    expected = nn.Unfold(size, stride=size)(pixels).transpose(1, 2)
    assert torch.equal(ops.patches.eager(pixels, size, "fp32"), expected)
    half = ops.patches.eager(pixels, size, "fp16")
    assert torch.equal(half, expected.half())


def test_the_class_token_comes_last() -> None:
    x, token, positions = torch.randn(2, 4, 3), torch.randn(3), torch.randn(5, 3)
    found = ops.tile_tokens.eager(x, token, positions)
    assert torch.equal(found[:, :4], x + positions[:4])
    assert torch.equal(found[:, 4], (token + positions[4]).expand(2, 3))


@pytest.mark.parametrize("side, dim, heads", [(24, 88, 16), (4, 16, 2), (1, 4, 1), (3, 12, 2)])
def test_rotary_positions_are_those_of_transformers(side: int, dim: int, heads: int) -> None:
    config = Llama4VisionConfig(
        hidden_size=dim * heads, num_attention_heads=heads, image_size=side * 2, patch_size=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    complex_table = Llama4VisionRotaryEmbedding(config).freqs_ci
    patches = torch.zeros(3, side**2, 1)
    cos, sin = ops.patch_rope_table.eager(patches, side, dim, 10_000.0)
    assert torch.equal(torch.complex(cos[1], sin[1]), complex_table[:, 0])
    assert torch.equal(cos[:, -1], torch.ones(3, dim // 2))  # the class token is not turned
    x = torch.randn(3, side**2 + 1, heads, dim)
    expected, _ = vision_apply_rotary_emb(x, x, complex_table)
    found = ops.rope.eager(x.flatten(2), cos, sin, heads, "adjacent")
    assert torch.allclose(found, expected.flatten(2), atol=1e-6)


@given(tiles=st.integers(1, 3), step=st.integers(1, 4), factor=st.sampled_from([1, 2, 4]))
def test_pixel_shuffle_is_that_of_transformers(tiles: int, step: int, factor: int) -> None:
    side = step * factor
    x = torch.randn(tiles, side**2 + 1, 5)
    expected = pixel_shuffle(x[:, :-1], 1 / factor)
    assert torch.equal(ops.pixel_shuffle.eager(x, side, factor), expected)


def test_features_replace_image_tokens_in_order() -> None:
    x, features = torch.randn(6, 4), torch.randn(3, 4)
    ids = torch.tensor([[1, 9, 9], [9, 2, 3]])
    fused = ops.fuse.eager(x, ids, features, 9)
    assert torch.equal(fused[[1, 2, 3]], features)
    assert torch.equal(fused[[0, 4, 5]], x[[0, 4, 5]])
    assert torch.equal(ops.fuse.eager(x, ids, features[:0], 9), x)  # no images: plain tokens


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_another_number_of_features_is_refused(rows: int) -> None:
    ids = torch.tensor([[1, 9, 9], [9, 2, 3]])
    with pytest.raises(MoecError, match="3, one per image token"):
        ops.fuse.eager(torch.randn(6, 4), ids, torch.randn(rows, 4), 9)


def test_attention_without_a_mask_sees_everything() -> None:
    q, k, v = (torch.randn(2, 5, 8) for _ in "qkv")
    everything = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    expected = ops.attention.eager(q, k, v, everything, 2, 2, None)
    assert torch.allclose(ops.attention.eager(q, k, v, None, 2, 2, None), expected, atol=1e-6)


def test_gelu_is_the_exact_one() -> None:
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    expected = x * (1 + torch.erf(x / 2**0.5)) / 2
    assert torch.allclose(ops.gelu.eager(x), expected, atol=1e-12)
