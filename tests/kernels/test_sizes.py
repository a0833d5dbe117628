"""The sizes of a model, asked before it is loaded, are those that the launches take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels need triton")

from moec.kernels.launches.decode import decode_moe
from moec.kernels.launches.prefill import prefill_moe
from moec.kernels.launches.step import attend, linear, rope_append
from moec.kernels.sizes import Heads, Sizes, check_sizes
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS

WIDTHS = st.sampled_from([16, 32, 48, 64, 80, 96, 160, 256, 5120])


def launch_all(spec: ModelSpec) -> None:
    """Ask for what a decode step launches, with few rows and with many."""
    text = spec.text
    kinds = {layer.moe for layer in text.all_layers}
    heads = Heads(text.heads, text.kv_heads, text.head_dim)
    for tokens in (1, 9, 64):
        linear(text.q_width + 2 * text.kv_width, text.dim, tokens)
        linear(text.dim, text.q_width, tokens)
        attend(heads, tokens, 100, True, 1e-5, False)
        rope_append(heads, tokens, True, 1e-5, False)
        if True in kinds:
            decode_moe(Sizes(text.dim, text.experts.hidden, text.experts.count), tokens)
        if False in kinds:
            linear(2 * text.dense_hidden, text.dim, tokens)
            linear(text.dim, text.dense_hidden, tokens)


@given(
    dim=WIDTHS, hidden=WIDTHS, dense=WIDTHS, size=st.sampled_from([8, 16, 24, 32, 48, 128]),
    kv_heads=st.integers(1, 3), group=st.integers(1, 5), ffn=st.sampled_from(["M", "D", "DM"]),
)  # fmt: skip
def test_what_is_refused_is_what_a_launch_refuses(
    dim: int, hidden: int, dense: int, size: int, kv_heads: int, group: int, ffn: str
) -> None:
    spec = PRESETS["maverick"]
    experts = spec.text.experts.model_copy(update={"hidden": hidden, "shared_hidden": hidden})
    update = {
        "dim": dim, "dense_hidden": dense, "experts": experts, "head_dim": size, "ffn": ffn,
        "heads": group * kv_heads, "kv_heads": kv_heads,
    }  # fmt: skip
    spec = spec.model_copy(update={"text": spec.text.model_copy(update=update)})
    try:
        launch_all(spec)
    except MoecError as error:
        assert "--device cpu" in error.next_step
        with pytest.raises(MoecError) as caught:
            check_sizes(spec)
        assert caught.value.exit_code == 3 and "--device cpu" in caught.value.next_step
    else:
        check_sizes(spec)


def test_every_size_that_is_off_is_named() -> None:
    spec = PRESETS["scout"]
    text = spec.text.model_copy(update={"dim": 80, "head_dim": 24})
    with pytest.raises(MoecError) as caught:
        check_sizes(spec.model_copy(update={"text": text}))
    for each in ("text.dim 80", "text.head_dim 24"):
        assert each in caught.value.found
    assert "hidden" not in caught.value.found


@pytest.mark.parametrize("name", ["scout", "maverick", "tiny-scout"])
def test_the_presets_fit(name: str) -> None:
    check_sizes(PRESETS[name])
    launch_all(PRESETS[name])


def test_the_advice_of_prefill_is_the_same() -> None:
    with pytest.raises(MoecError, match="--device cpu"):
        prefill_moe(Sizes(100, 100, 4), 70)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 16384, "kv_heads": 1}, "heads / kv_heads"),
        ({"dim": 1 << 20}, r"text\.dim"),
        ({"head_dim": 16384}, "16 to 256"),
    ],
)
def test_sizes_that_would_keep_a_compiler_busy_are_refused(
    change: dict[str, int], message: str
) -> None:
    text = PRESETS["scout"].text
    spec = PRESETS["scout"].model_copy(update={"text": text.model_copy(update=change)})
    with pytest.raises(MoecError, match=message) as refused:
        check_sizes(spec)
    assert refused.value.exit_code == 3
    for name in ("scout", "maverick"):
        check_sizes(PRESETS[name])
