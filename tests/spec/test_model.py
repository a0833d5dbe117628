from dataclasses import replace

import pytest
from hypothesis import given
from pydantic import ValidationError

from moec.exporters.onnx.experts import branches, static
from moec.spec.model import QK_NORMS, ModelSpec, TextSpec, shortest_tile
from moec.spec.parameters import counts
from moec.spec.plan import plan
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from tests.strategies import specs


@pytest.mark.parametrize(
    "name, total, active_text, vision, projector",
    [
        ("scout", 108_641_793_536, 17_172_894_720, 850_960_896, 20_971_520),
        ("maverick", 401_583_781_376, 17_184_691_200, 850_960_896, 20_971_520),
        ("tiny-scout", 4_868_096, 1_853_568, 57_216, 8_192),
    ],
)
def test_parameter_counts_are_exact(
    name: str, total: int, active_text: int, vision: int, projector: int
) -> None:
    found = counts(PRESETS[name])
    assert found["total"] == total
    assert found["active_text"] == active_text
    assert (found["vision"], found["projector"]) == (vision, projector)


def test_a_dense_model_has_no_experts_to_count_and_may_say_some() -> None:
    text = PRESETS["tiny-scout"].text.model_dump() | {"ffn": "DD", "dense_hidden": 96}
    dense = PRESETS["tiny-scout"].model_dump() | {"vision": None, "text": text}
    spec = ModelSpec.model_validate(dense)
    assert spec.text.experts is None and not any(layer.moe for layer in spec.text.all_layers)
    assert spec == ModelSpec.model_validate(dense | {"text": text | {"experts": None}})
    layer = 2 * 128 + 2 * 128 * 128 + 2 * 64 * 128 + 3 * 96 * 128
    total = 2 * 4096 * 128 + 128 + 8 * layer
    found = {"total": total, "text": total, "active": total, "active_text": total}
    assert counts(spec) == found | {"vision": 0, "projector": 0, "routed_experts": 0}
    assert plan(spec).experts_read == 0 and plan(spec).weights_bytes == 2 * total
    assert reduced(spec).text.experts is None


def test_layers_with_experts_want_them() -> None:
    text = PRESETS["scout"].text.model_dump() | {"experts": None, "ffn": "DDM"}
    with pytest.raises(ValidationError, match="MoE layers need experts"):
        ModelSpec.model_validate(PRESETS["scout"].model_dump() | {"text": text})


def test_behemoth_is_marked_as_a_guess_and_lands_near_the_public_figures() -> None:
    spec = PRESETS["behemoth"]
    assert spec.provenance == "estimated"
    assert "HYPOTHETICAL" in spec.notes[0]
    assert spec.text.experts.count == 16
    assert counts(spec)["active_text"] == pytest.approx(288e9, rel=0.01)
    assert counts(spec)["total"] == pytest.approx(2e12, rel=0.01)


def test_irope_and_dense_interleaving_are_independent() -> None:
    scout, maverick = PRESETS["scout"].text, PRESETS["maverick"].text
    nope = [layer.index for layer in scout.all_layers if not layer.rope]
    assert nope == list(range(3, 48, 4))
    assert nope == [layer.index for layer in maverick.all_layers if not layer.rope]
    assert all(layer.moe for layer in scout.all_layers)
    assert [layer.moe for layer in maverick.all_layers] == [False, True] * 24


@pytest.mark.parametrize(
    "name, total, active",
    [
        ("olmoe-1b-7b", 6_919_161_856, 1_282_017_280),
        ("qwen3-30b-a3b", 30_532_122_624, 3_353_032_704),
        ("mixtral-8x7b", 46_702_792_704, 12_879_925_248),
        ("deepseek-moe-16b", 16_375_728_128, 2_828_650_496),
        ("deepseek-moe-145b", 144_482_226_176, 22_056_783_872),
        ("deepseek-v3", 671_026_419_200, 37_552_297_472),
        ("aria", 24_869_091_840, 4_115_151_360),
    ],
)
def test_counts_of_the_other_presets(name: str, total: int, active: int) -> None:
    found = counts(PRESETS[name])
    assert (found["total"], found["active_text"]) == (total, active)


def test_layer_reads_every_pattern() -> None:
    layer = PRESETS["scout"].text.layer(7)
    assert (layer.rope, layer.chunk, layer.qk_norm, layer.temperature) == (False, None, None, True)
    layer = PRESETS["scout"].text.layer(8)
    assert (layer.rope, layer.chunk, layer.temperature) == (True, 8192, False)
    assert layer.qk_norm == QK_NORMS["Q"]


@pytest.mark.parametrize(
    "pattern, layers, tile",
    [
        ("LLLGLLLG", 8, "LLLG"),
        ("LLLGL", 5, "LLLG"),
        ("MMM", 3, "M"),
        ("DMM", 3, "DM"),
        ("X", 4, "X"),
    ],
)
def test_patterns_are_stored_as_their_shortest_tile(pattern: str, layers: int, tile: str) -> None:
    if pattern == "DMM":
        tile = "DMM"  # D M D would be another model
    assert shortest_tile(pattern, layers) == tile


@pytest.mark.parametrize(
    "field, value",
    [
        ("attention", "LX"), ("attention", ""), ("ffn", "M" * 49),
        ("heads", 41), ("head_dim", 127),
        ("chunk", None), ("layers", 0), ("norm_eps", 0.0), ("surprise", 1),
        ("rope_theta", float("nan")),
    ],
)  # fmt: skip
def test_bad_fields_are_refused(field: str, value: object) -> None:
    values = PRESETS["scout"].model_dump()
    values["text"][field] = value
    with pytest.raises(ValidationError):
        ModelSpec.model_validate(values)


def test_specs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        PRESETS["scout"].text.layers = 1


@given(specs())
def test_json_round_trip(spec: ModelSpec) -> None:
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


#: presets whose proof at full depth and with all experts would take minutes
MANY_EXPERTS = {"qwen3-30b-a3b", "deepseek-moe-145b", "deepseek-v3"}


def _has_two_layers_of_each_kind(small: ModelSpec, spec: ModelSpec) -> None:
    def kinds(text: TextSpec) -> list[object]:
        none = {"experts": None, "caches": (), "chunk": 0, "window": 0, "index": 0}
        layers = (replace(each, **none) for each in text.all_layers)
        return [(each, old.moe) for each, old in zip(layers, text.all_layers, strict=True)]

    few, all_kinds = kinds(small.text), kinds(spec.text)
    assert all(few.count(kind) >= min(2, all_kinds.count(kind)) for kind in all_kinds)
    assert len(few) < len(all_kinds)
    how, old = small.text.experts, spec.text.experts
    assert how and old and how.routing == old.routing and how.top_k == old.top_k
    assert how.count > max(branches.FEW, static.FEW), "written as the experts of the whole model"
    assert how.count % how.routing.groups == 0 and how.count // how.routing.groups >= 2
    assert how.top_k < how.count // how.routing.groups * how.routing.kept_groups
    assert (how.shared_hidden is None) == (old.shared_hidden is None)


@pytest.mark.parametrize("name", PRESETS)
def test_a_twin_keeps_depth_patterns_experts_and_switches(name: str) -> None:
    spec = PRESETS[name]
    small = reduced(spec)
    ModelSpec.model_validate(small.model_dump())  # model_copy does not validate
    if name in MANY_EXPERTS:
        _has_two_layers_of_each_kind(small, spec)
    else:
        kept = ("layers", "attention", "rope", "qk_norm", "temperature", "ffn", "rope_theta")
        assert all(getattr(small.text, field) == getattr(spec.text, field) for field in kept)
        assert small.text.experts.count == spec.text.experts.count
    assert small.text.heads * spec.text.kv_heads == small.text.kv_heads * spec.text.heads
    assert (small.text.rope_scaling is None) == (spec.text.rope_scaling is None)
    assert counts(small)["total"] < 20e6 or spec.text.experts.count > 16
