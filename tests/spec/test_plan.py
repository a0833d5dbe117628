"""Against figures worked out by hand for Scout and Maverick."""

import pytest

from moec.spec.errors import MoecError
from moec.spec.plan import plan


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
    found = plan(model, precision, context, batch, "h200")
    assert found.decode_ms == pytest.approx(milliseconds, abs=0.02)


@pytest.mark.parametrize(
    "precision, context, milliseconds", [("bf16", 8192, 355.0), ("fp8", 8192, 206.7)]
)
def test_prefill_bounds(precision: str, context: int, milliseconds: float) -> None:
    assert plan("scout", precision, context, 1, "h200").prefill_ms == pytest.approx(
        milliseconds, abs=0.5
    )


def test_rings_keep_the_cache_of_chunked_layers_fixed() -> None:
    found = plan("scout", "bf16", 1_048_576)
    assert found.full_cache_bytes == pytest.approx(206.16e9, rel=1e-3)
    assert found.cache_bytes == pytest.approx(52.75e9, rel=1e-3)


def test_weights_and_fit() -> None:
    assert plan("scout", "fp8").weights_bytes == pytest.approx(109.8e9, rel=1e-3)
    assert plan("scout", "fp8", device="h200").fits is True
    assert plan("scout", "bf16", device="h200").fits is False
    assert plan("scout", "bf16").fits is None


@pytest.mark.parametrize("bad", [{"precision": "int3"}, {"device": "abacus"}, {"context": 0}])
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(MoecError):
        plan("scout", **bad)  # type: ignore[arg-type]
