"""One row per variant, readable side by side. Sources: the released `config.json` files.

Scout has 16 experts and 109 B parameters, Maverick 128 experts and 402 B; articles have been seen
to swap the two, and to call Maverick's alternation of dense and MoE layers "iRoPE". It is not:
iRoPE is the `attention`/`rope` pattern, and both models share it.
"""

from moec.spec.model import Experts, ModelSpec, RopeScaling, TextSpec, Tokens, VisionSpec

_VISION = VisionSpec(
    layers=34, dim=1408, heads=16, hidden=5632, image=336, patch=14, channels=3, shuffle=2,
    adapter_hidden=4096, adapter_out=4096, rope_theta=10_000.0,
)  # fmt: skip
_TOKENS = Tokens(
    bos=200000, eos=(200001, 200007, 200008), pad=200018,
    image=200092, image_start=200080, image_end=200081,
)  # fmt: skip

_ROWS = (
    ModelSpec(
        name="scout", provenance="released", dtype="bf16", vision=_VISION, tokens=_TOKENS,
        text=TextSpec(
            layers=48, dim=5120, heads=40, kv_heads=8, head_dim=128, vocab=202048,
            max_positions=10_485_760, norm_eps=1e-5,
            attention="LLLG", rope="RRRN", temperature="---T", qk_norm="QQQ-", ffn="M",
            chunk=8192, rope_theta=500_000.0,
            rope_scaling=RopeScaling(factor=16.0, low=1.0, high=1.0, original_positions=8192),
            temperature_floor=8192, temperature_scale=0.1, dense_hidden=16384,
            experts=Experts(count=16, top_k=1, hidden=8192, shared_hidden=8192),
        ),
    ),
    ModelSpec(
        name="maverick", provenance="released", dtype="bf16", vision=_VISION, tokens=_TOKENS,
        text=TextSpec(
            layers=48, dim=5120, heads=40, kv_heads=8, head_dim=128, vocab=202048,
            max_positions=1_048_576, norm_eps=1e-5,
            attention="LLLG", rope="RRRN", temperature="---T", qk_norm="-", ffn="DM",
            chunk=8192, rope_theta=500_000.0, rope_scaling=None,
            temperature_floor=8192, temperature_scale=0.1, dense_hidden=16384,
            experts=Experts(count=128, top_k=1, hidden=8192, shared_hidden=8192),
        ),
    ),
    ModelSpec(
        name="behemoth", provenance="estimated", dtype="bf16", vision=_VISION, tokens=_TOKENS,
        notes=(
            "HYPOTHETICAL: Behemoth was announced but never released, and no config is public.",
            "Public: 288 B active parameters, 16 experts, about 2 T in total.",
            "Guessed: every other field. Width, depth and expert width were chosen to land near "
            "those three figures; iRoPE, QK-norm, RoPE, vocabulary and vision are Scout's.",
        ),
        text=TextSpec(
            layers=96, dim=16384, heads=128, kv_heads=8, head_dim=128, vocab=202048,
            max_positions=262_144, norm_eps=1e-5,
            attention="LLLG", rope="RRRN", temperature="---T", qk_norm="QQQ-", ffn="M",
            chunk=8192, rope_theta=500_000.0, rope_scaling=None,
            temperature_floor=8192, temperature_scale=0.1, dense_hidden=48128,
            experts=Experts(count=16, top_k=1, hidden=24064, shared_hidden=24064),
        ),
    ),
    ModelSpec(
        name="tiny-scout", provenance="custom", dtype="bf16",
        notes=("A trained 4.9 M model with Scout's architecture: examples/tiny-scout.",),
        vision=VisionSpec(
            layers=2, dim=32, heads=2, hidden=128, image=56, patch=14, channels=3, shuffle=2,
            adapter_hidden=64, adapter_out=64, rope_theta=10_000.0,
        ),
        tokens=Tokens(bos=0, eos=(1,), pad=5, image=4, image_start=2, image_end=3),
        text=TextSpec(
            layers=8, dim=128, heads=4, kv_heads=2, head_dim=32, vocab=4096,
            max_positions=2048, norm_eps=1e-5,
            attention="LLLG", rope="RRRN", temperature="---T", qk_norm="QQQ-", ffn="M",
            chunk=128, rope_theta=500_000.0,
            rope_scaling=RopeScaling(factor=16.0, low=1.0, high=1.0, original_positions=128),
            temperature_floor=128, temperature_scale=0.1, dense_hidden=128,
            experts=Experts(count=16, top_k=1, hidden=64, shared_hidden=64),
        ),
    ),
)  # fmt: skip

PRESETS: dict[str, ModelSpec] = {row.name: row for row in _ROWS}
