"""The meaning of the ops that have traps, against plain statements of it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

from moec.graph_builder import ops
from moec.graph_builder.ops.rope import inverse_frequencies
from tests.routes import by


@given(
    slots=st.integers(1, 9),
    chunk=st.one_of(st.none(), st.integers(1, 9)),
    calls=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=6),
)
def test_a_ring_holds_what_a_list_would(
    slots: int, chunk: int | None, calls: list[tuple[int, int]]
) -> None:
    """Two rows of different length, any calls: each slot holds the newest token that maps to it."""
    cache = torch.full((2, slots, 1), -1.0)
    past = torch.zeros(2, dtype=torch.int64)
    for call in calls:
        width = max(1, *call)
        new = torch.tensor(call)
        positions = past[:, None] + torch.arange(width)
        tokens = positions[..., None].float()  # each token's key is its own position
        seen = ops.cache_append.eager(cache, tokens)
        held = ops.key_positions.eager(cache, past, positions)
        for row in range(2):
            known = {int(p): float(k) for p, k in zip(held[row], seen[row, :, 0], strict=True)}
            assert all(key == position for position, key in known.items() if position >= 0)
            oldest = max(0, int(past[row]) - slots)
            assert set(range(oldest, int(past[row]))) <= set(known)
        mask = ops.attention_mask.eager(positions, held, chunk, None)
        for row in range(2):
            for column in range(width):
                q = int(positions[row, column])
                visible = sorted(held[row][mask[row, 0, column]].tolist())
                floor = 0 if chunk is None else q // chunk * chunk
                kept = set(range(max(0, int(past[row]) - slots), q + 1))
                assert visible == [p for p in range(floor, q + 1) if p in kept]
        cache = ops.cache_write.eager(seen, ops.cache_index.eager(cache, past, new))
        past = past + new
    for row in range(2):
        for slot in range(slots):
            written = [p for p in range(int(past[row])) if p % slots == slot]
            assert cache[row, slot, 0] == (written[-1] if written else -1)


def test_the_first_token_of_a_chunk_sees_itself_only() -> None:
    positions = torch.arange(8)[None]
    mask = ops.attention_mask.eager(positions, positions, 4, None)[0, 0]
    assert mask[4].nonzero().flatten().tolist() == [4]
    assert mask[7].nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "position, factor",
    [(8190, 1.0), (8191, 1.06931), (16383, 1.10986), (131071, 1.2833), (10485759, 1.7155)],
)
def test_temperature_steps_at_the_published_positions(position: int, factor: float) -> None:
    found = ops.temperature.eager(torch.tensor([[position]]), 8192, 0.1)
    assert found.item() == pytest.approx(factor, abs=1e-4)


@pytest.mark.parametrize("low, high, factor", [(1.0, 1.0, 16.0), (1.0, 4.0, 8.0), (0.5, 2.0, 3.0)])
def test_frequencies_are_those_of_transformers(low: float, high: float, factor: float) -> None:
    config = Llama4TextConfig(
        head_dim=128,
        num_hidden_layers=4,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor,
            "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    theirs = Llama4TextRotaryEmbedding(config).inv_freq
    ours = inverse_frequencies(128, 500000.0, "bands", [factor, low, high, 8192.0])
    assert torch.equal(ours, theirs) or torch.allclose(ours, theirs, rtol=1e-6, atol=0)


def test_scout_scales_29_of_64_frequencies_and_none_is_nan() -> None:
    plain = inverse_frequencies(128, 500000.0, "none", [])
    scaled = inverse_frequencies(128, 500000.0, "bands", [16.0, 1.0, 1.0, 8192.0])
    assert int((plain != scaled).sum()) == 29
    assert torch.equal(plain[35:] / 16, scaled[35:])


@given(st.integers(0, 10_485_760))
def test_rotation_equals_complex_multiplication(position: int) -> None:
    where = torch.tensor([[position]])
    cos, sin = ops.rope_table.eager(where, 8, 10_000.0, "none", [], 1.0)
    x = torch.randn(1, 1, 16)
    turned = ops.rope.eager(x, cos, sin, 2, "adjacent")
    pairs = torch.view_as_complex(x.reshape(1, 1, 2, 4, 2))
    expected = torch.view_as_real(pairs * torch.complex(cos, sin)[:, :, None])
    assert torch.allclose(turned, expected.flatten(2), atol=1e-6)


def test_the_score_scales_the_input_not_the_output() -> None:
    x, gate_up, down = torch.randn(3, 4), torch.randn(5, 4, 6), torch.randn(5, 3, 4)
    logits = torch.randn(3, 5)
    scores, experts = ops.route.eager(*by(logits, 1))
    out = ops.moe.eager(x, scores, experts, "input", gate_up, down)
    for token in range(3):
        expert = int(logits[token].argmax())
        scaled = x[token] / (1 + math.exp(-logits[token, expert]))
        gate, up = (scaled @ gate_up[expert]).chunk(2)
        expected = (gate.sigmoid() * gate * up) @ down[expert]
        assert torch.allclose(out[token], expected, atol=1e-5)


def test_separate_experts_equal_a_stack() -> None:
    x, gate_up, down = torch.randn(7, 4), torch.randn(3, 4, 6), torch.randn(3, 3, 4)
    routed = (x, *ops.route.eager(*by(torch.randn(7, 3), 2)), "input")
    halves = [half for each in gate_up for half in each.t().chunk(2)]
    found = ops.separate_moe.target(*routed, halves, [each.t() for each in down])
    assert torch.allclose(found, ops.moe.target(*routed, gate_up, down), atol=1e-5)


def test_moe_equals_the_dense_sum_with_zero_scores() -> None:
    """transformers runs all experts, scores of the others at zero: the same function."""
    x, gate_up, down = torch.randn(7, 4), torch.randn(5, 4, 6), torch.randn(5, 3, 4)
    logits = torch.randn(7, 5)
    scores, experts = ops.route.eager(*by(logits, 2))
    dense = torch.zeros(7, 5).scatter(1, experts, scores)
    gate, up = torch.einsum("te,td,edf->etf", dense, x, gate_up).chunk(2, -1)
    expected = ((gate.sigmoid() * gate * up) @ down).sum(0)
    assert torch.allclose(
        ops.moe.eager(x, scores, experts, "input", gate_up, down), expected, atol=1e-4
    )


def test_rms_norm_casts_before_the_weight() -> None:
    x = torch.randn(3, 64, dtype=torch.bfloat16) * 9
    weight = torch.randn(64, dtype=torch.bfloat16)
    normal = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(ops.rms_norm.eager(x, weight, 1e-5), normal * weight)
