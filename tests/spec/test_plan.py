"""Against figures worked out by hand for Scout and Maverick."""

import pytest

from moec.spec.errors import MoecError
from moec.spec.plan import plan
from moec.spec.presets import PRESETS


@pytest.mark.parametrize(
    "model, precision, batch, context, milliseconds",
    [
        ("scout", "bf16", 1, 1024, 7.55),
        ("scout", "fp8", 1, 1024, 4.04),
        ("scout", "fp8", 1, 131_072, 5.77),
        ("maverick", "bf16", 8, 8192, 20.04),
        ("maverick", "fp8", 64, 1024, 41.77),
        ("scout", "fp8", 64, 1024, 27.70),
    ],
)
def test_decode_bounds(
    model: str, precision: str, batch: int, context: int, milliseconds: float
) -> None:
    found = plan(model, precision, context=context, batch=batch, device="h200")
    assert found.decode_ms == pytest.approx(milliseconds, rel=2e-3)  # scales: 0.1 %


@pytest.mark.parametrize(
    "precision, context, milliseconds", [("bf16", 8192, 355.0), ("fp8", 8192, 206.7)]
)
def test_prefill_bounds(precision: str, context: int, milliseconds: float) -> None:
    found = plan("scout", precision, context=context, device="h200")
    assert found.prefill_ms == pytest.approx(milliseconds, abs=0.5)


def test_rings_keep_the_cache_of_chunked_layers_fixed() -> None:
    found = plan("scout", "bf16", context=1_048_576)
    assert found.full_cache_bytes == pytest.approx(206.16e9, rel=1e-3)
    assert found.cache_bytes == pytest.approx(52.75e9, rel=1e-3)


def test_weights_and_fit() -> None:
    assert plan("scout", "fp8").weights_bytes == pytest.approx(109.92e9, rel=1e-4)  # 0.09 of scales
    assert plan("scout", "fp8", device="h200").fits is True
    assert plan("scout", "bf16", device="h200").fits is False
    assert plan("scout", "bf16").fits is None


@pytest.mark.parametrize("bad", [{"precision": "int3"}, {"device": "abacus"}, {"context": 0}])
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(MoecError):
        plan("scout", **bad)  # type: ignore[arg-type]


def test_image_tiles_cost_the_tower() -> None:
    plain, some = plan("scout"), plan("scout", tiles=5, device="h200")
    assert (plain.vision_flops, plain.vision_ms) == (0, None)
    assert some.vision_bytes == 2 * (850_960_896 + 20_971_520)
    # By hand: 2 FLOP a weight for 576 patches, 577 rows, 144 tokens; and two attention products.
    layer = 4 * 1408**2 + 2 * 1408 * 5632
    tile = 2 * (588 * 1408 * 576 + 34 * layer * 577 + (5632 + 4096 + 5120) * 4096 * 144)
    tile += 34 * 4 * 577**2 * 1408
    assert some.vision_flops == 5 * tile
    assert some.vision_ms == pytest.approx(1e3 * 5 * tile / 790e12)
    assert plan("scout", "fp8", tiles=1).vision_bytes == some.vision_bytes


@pytest.mark.parametrize("tiles", [-1, 3])
def test_tiles_need_a_tower(tiles: int) -> None:
    spec = PRESETS["scout"].model_copy(update={"vision": None})
    with pytest.raises(MoecError, match="tiles"):
        plan(spec, tiles=tiles)


@pytest.mark.full
def test_tiles_take_memory_and_context() -> None:
    spec = PRESETS["scout"]
    contexts = range(700_000, 800_000, 1000)

    def most(tiles: int) -> int:
        sizes = {"device": "h200", "tiles": tiles}
        return max(c for c in contexts if plan(spec, "fp8", context=c, **sizes).fits)

    assert contexts[0] < most(tiles=1) < most(tiles=0) < contexts[-1]
    with pytest.raises(MoecError, match="144 tokens"):
        plan(spec, context=143, tiles=1)


def test_the_cache_of_latent_attention_is_one_vector_a_token() -> None:
    found = plan("deepseek-v3", "bf16", context=131_072)
    assert found.cache_bytes == 61 * 131_072 * (512 + 64) * 2  # 9.21 GB
    assert found.cache_bytes == pytest.approx(9.21e9, rel=1e-3)
