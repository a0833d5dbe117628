"""Schemes: what they say, what they make of a model's tensors, and what a model costs with them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import moec
from moec.spec.files import load_scheme
from moec.spec.model import ModelSpec, TextSpec
from moec.spec.parameters import parameters
from moec.spec.parts.routing import Experts
from moec.spec.plan import plan
from moec.spec.presets import PRESETS
from moec.spec.scheme import ATTENTION, DENSE, EXPERTS, SCHEMES, SHARED, Scheme
from moec.spec.tensors import Kind, eligible, quantized, tensors
from tests.damage import NESTED, SPEC, text
from tests.refusals import refusal, refused_and_nothing_left

#: a dense layer of a chunk of 4 tokens, then one of experts; no width but 8 is a whole block
SMALL = ModelSpec(
    name="small", provenance="custom", dtype="bf16",
    text=TextSpec(
        layers=2, dim=12, heads=2, kv_heads=1, head_dim=4, vocab=16, max_positions=64,
        norm_eps=1e-5, attention="LG", rope="RN", qk_norm="-", temperature="-", ffn="DM",
        chunk=4, rope_theta=10_000.0, rope_scaling=None,
        temperature_floor=8, temperature_scale=0.1, dense_hidden=6,
        experts=Experts(count=3, top_k=1, hidden=5, shared_hidden=5),
    ),
)  # fmt: skip
ALL = EXPERTS + SHARED + DENSE + ATTENTION
ROUTED = {"layers.*.moe.gate_up", "layers.*.moe.down"}
LINEAR = ROUTED | {
    *(f"layers.*.attn.{part}.weight" for part in "qkvo"),
    *(f"layers.*.{at}.{x}.weight" for at in ("ffn", "moe.shared") for x in ("gate", "up", "down")),
}


def scheme(*of: str, weight: str = "channel", inputs: str = "none", **more: object) -> Scheme:
    rules = [{"of": of or ALL, "weight": weight, "inputs": inputs}]
    return Scheme.model_validate({"name": "mine", "rules": rules, **more})


def small(given: Scheme | None, **more: object) -> ModelSpec:
    return SMALL.model_copy(update={"scheme": given, **more})


# ---------------------------------------------------------------- the named ones


@pytest.mark.parametrize(
    "name, kinds, weight, inputs, cache",
    [
        ("meta", ROUTED, "channel", "token", False),
        ("dynamic", LINEAR, "channel", "token", False),
        ("modelopt", LINEAR, "tensor", "tensor", True),
        ("deepseek", LINEAR, "block", "group", False),
    ],
)
def test_named_schemes_say_what_they_are_called_after(
    name: str, kinds: set[str], weight: str, inputs: str, cache: bool
) -> None:
    named = SCHEMES[name]
    spec = PRESETS["maverick"].model_copy(update={"scheme": named})
    rules = quantized(spec)
    assert {re.sub(r"layers\.\d+", "layers.*", each) for each in rules} == kinds
    assert {(rule.weight, rule.inputs) for rule in rules.values()} == {(weight, inputs)}
    assert (named.cache, named.static) == (cache, cache)
    assert (named.block, named.layout, named.scales) == (128, "moec", "fp32")


@pytest.mark.parametrize("model", ["scout", "maverick"])
@pytest.mark.parametrize("name", SCHEMES)
def test_routers_norms_embedding_head_and_tower_stay_wide(name: str, model: str) -> None:
    spec = PRESETS[model].model_copy(update={"scheme": SCHEMES[name]})
    found = tensors(spec)
    apart = re.compile(r"router|norm|embed|head|vision|projector|bias")
    wide = {key: shape for key, shape in parameters(spec).items() if apart.search(key)}
    assert len(wide) > 600
    assert {key: found[key] for key in wide} == {k: Kind(s, "bf16") for k, s in wide.items()}
    layers = [f"layers.{index}." for index in range(48)]
    routed = [at for at in layers if found.get(f"{at}moe.down", Kind((), "")).dtype == "fp8"]
    assert len(routed) == (48 if model == "scout" else 24)


# ---------------------------------------------------------------- a model's tensors


def test_without_a_scheme_there_are_parameters_alone() -> None:
    assert tensors(SMALL) == {k: Kind(s, "bf16") for k, s in parameters(SMALL).items()}
    assert quantized(SMALL) == {}


#: what shares a scale -> shapes of the scales of q [8, 12], gate_up [3, 12, 10], down [3, 5, 12]
GRIDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "tensor": ((), (), ()),
    "expert": ((), (3,), (3,)),
    "channel": ((8,), (3, 10), (3, 12)),
    "block": ((1, 2), (3, 2, 2), (3, 1, 2)),
}


@pytest.mark.parametrize("weight", GRIDS)
@pytest.mark.parametrize("layout", ["moec", "modelopt", "fbgemm_fp8"])
def test_scales_of_fused_experts(layout: str, weight: str) -> None:
    given = scheme("layers.0.attn.q.weight", *EXPERTS, weight=weight, layout=layout, block=8)
    found = tensors(small(given))
    codes = {
        "layers.0.attn.q.weight": (8, 12),
        "layers.1.moe.gate_up": (3, 12, 10),
        "layers.1.moe.down": (3, 5, 12),
    }
    scales = zip((f"{name}_scale" for name in codes), GRIDS[weight], strict=True)
    expected = {name: Kind(shape, "fp8") for name, shape in codes.items()}
    expected |= {name: Kind(shape, "fp32") for name, shape in scales}
    assert {name: found[name] for name in expected} == expected
    assert set(found) == set(parameters(SMALL)) | set(expected)


@pytest.mark.parametrize("weight, wide, tall", [("channel", (5,), (12,)), ("expert", (), ())])
def test_scales_of_separate_experts(
    weight: str, wide: tuple[int, ...], tall: tuple[int, ...]
) -> None:
    given = scheme(*EXPERTS, weight=weight, layout="compressed-tensors", scales="bf16")
    expected = {}
    for expert in range(3):
        at = f"layers.1.moe.experts.{expert}"
        for part, shape, scales in (
            ("gate", (5, 12), wide),
            ("up", (5, 12), wide),
            ("down", (12, 5), tall),
        ):
            expected[f"{at}.{part}.weight"] = Kind(shape, "fp8")
            expected[f"{at}.{part}.weight_scale"] = Kind(scales, "bf16")
    fused = {"layers.1.moe.gate_up", "layers.1.moe.down"}
    others = {k: Kind(s, "bf16") for k, s in parameters(SMALL).items() if k not in fused}
    assert tensors(small(given)) == others | expected


@pytest.mark.parametrize(
    "inputs, linear, experts",
    [
        ("none", None, None), ("token", None, None), ("group", None, None),
        ("tensor", (), ()), ("expert", (), (3,)),
    ],
)  # fmt: skip
def test_static_inputs_have_scales(inputs: str, linear: object, experts: object) -> None:
    found = tensors(small(scheme(inputs=inputs, scales="fp16")))
    for name, shape in (
        ("layers.0.attn.q.input_scale", linear),
        ("layers.0.ffn.down.input_scale", linear),
        ("layers.1.moe.shared.up.input_scale", linear),
        ("layers.1.moe.gate_up_input_scale", experts),
        ("layers.1.moe.down_input_scale", experts),
    ):
        assert found.get(name) == (None if shape is None else Kind(shape, "fp16"))


def test_fp8_caches_have_two_scales_a_layer() -> None:
    found = tensors(small(scheme(*DENSE, cache=True))).keys()
    caches = {f"layers.{index}.attn.{part}_scale" for index in (0, 1) for part in "kv"}
    assert found - tensors(small(scheme(*DENSE))).keys() == caches


@pytest.mark.parametrize("name", ["modelopt", "static", "mixed"])
def test_the_heads_of_latent_attention_have_no_static_scale(name: str) -> None:
    """Nothing is the input of kv_b_proj, and a layer has one cache: calibration finds no other."""
    spec = PRESETS["deepseek-v3"]
    own = spec.model_copy(update={"scheme": SCHEMES[name]})
    found = {key.removeprefix("layers.0.attn.") for key in tensors(own) if ".0.attn." in key}
    assert {"kv_up.weight", "kv_up.weight_scale", "kv_down.input_scale"} <= found
    assert "kv_up.input_scale" not in found and "v_scale" not in found
    assert ("k_scale" in found) == SCHEMES[name].cache

    published = SCHEMES[name].model_copy(update={"layout": "modelopt"})
    stored = tensors(own.model_copy(update={"scheme": published})).keys()
    assert "layers.0.attn.kv_up.input_scale" in stored
    assert ("layers.0.attn.v_scale" in stored) == SCHEMES[name].cache


def test_the_first_rule_that_matches_holds() -> None:
    rules = [
        {"of": ["layers.0.attn.q.weight"], "weight": "tensor"},
        {"of": ["layers.*.attn.?.weight"], "weight": "block", "inputs": "group"},
    ]
    given = Scheme.model_validate({"name": "two", "rules": rules, "block": 4})
    found = tensors(small(given))
    assert found["layers.0.attn.q.weight_scale"].shape == ()
    assert found["layers.1.attn.q.weight_scale"].shape == (2, 3)
    assert found["layers.0.attn.k.weight_scale"].shape == (1, 3)
    assert given.rule("head.weight") is None and not given.static


#: what is wrong -> (patterns of rules with weights by channel, what the message must name)
NO_RULES: dict[str, tuple[list[tuple[str, ...]], str]] = {
    "a misspelt name": ([("layers.*.attn.query.weight",)], "layers.*.attn.query.weight"),
    "one good rule, one misspelt": ([ATTENTION, ("layers.*.mo.*",)], "layers.*.mo.*"),
    "a layer too many": ([("layers.2.attn.q.weight",)], "layers.2.attn.q.weight"),
    "the embedding": ([("embed.weight",)], "embed.weight"),
    "norms": ([("*norm.weight",)], "*norm.weight"),
    "a tower that is not there": ([("vision.*",)], "vision.*"),
    "an empty pattern": ([("",)], "scheme mine"),
    "gate_up alone": ([("layers.*.moe.gate_up",)], "layers.1.moe"),
    "down alone": ([("layers.*.moe.down",)], "layers.1.moe"),
}


@pytest.mark.parametrize("case", NO_RULES)
def test_a_rule_for_no_weight_is_refused(case: str) -> None:
    patterns, names = NO_RULES[case]
    rules = [{"of": of, "weight": "channel"} for of in patterns]
    given = Scheme.model_validate({"name": "mine", "rules": rules})
    refusal(lambda: tensors(small(given)), names)


def test_experts_whose_inputs_differ_are_refused() -> None:
    rules = [
        {"of": ["layers.*.moe.gate_up"], "weight": "channel", "inputs": "token"},
        {"of": ["layers.*.moe.down"], "weight": "channel", "inputs": "group"},
    ]
    given = Scheme.model_validate({"name": "mine", "rules": rules})
    refusal(lambda: quantized(small(given)), "layers.1.moe")
    rules[1]["inputs"] = "token"
    rules[1]["weight"] = "block"
    assert quantized(small(Scheme.model_validate({"name": "mine", "rules": rules})))


def test_a_tied_head_is_no_weight_of_its_own() -> None:
    tied = SMALL.text.model_copy(update={"tie_embeddings": True})
    assert "head.weight" in eligible(SMALL)
    given = scheme("head.weight")
    assert quantized(small(given))
    refusal(lambda: quantized(small(given, text=tied)), "head.weight")


# ---------------------------------------------------------------- scheme files


@pytest.mark.parametrize("name", SCHEMES)
def test_names_and_files_give_the_same_scheme(tmp_path: Path, name: str) -> None:
    values = SCHEMES[name].model_dump(mode="json")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "b.yml").write_text(yaml.safe_dump(values))
    (tmp_path / "c.json").write_text(json.dumps(values))
    for source in (name, SCHEMES[name], *sorted(tmp_path.iterdir())):
        assert load_scheme(source) == SCHEMES[name]


def test_a_file_needs_a_name_and_rules_alone(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: mine\nrules: [{of: [head.weight], weight: tensor}]")
    assert load_scheme(tmp_path / "a.yaml") == scheme("head.weight", weight="tensor")


def content(dotted: str, value: object) -> str:
    """A sound scheme file with one field set."""
    values: dict[str, Any] = SCHEMES["meta"].model_dump(mode="json")
    inner: Any = values
    *outer, last = dotted.split(".")
    for key in outer:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value
    return json.dumps(values)


#: what is wrong -> (name of the file, what is in it, what the message must name)
FILES: dict[str, tuple[str, str | bytes, str]] = {
    "broken YAML": ("x.yaml", "name: [", "x.yaml"),
    "broken JSON": ("x.json", "{", "x.json"),
    "no text": ("x.yaml", b"\xff\xfe\x00", "x.yaml"),
    "a list": ("x.yaml", "- 1", "x.yaml"),
    "empty": ("x.yaml", "", "x.yaml"),
    "YAML that builds objects": ("x.yaml", "!!python/object/apply:os.getcwd []", "x.yaml"),
    "YAML nested without end": ("x.yaml", NESTED, "x.yaml"),
    "JSON nested without end": ("x.json", NESTED, "x.json"),
    "another suffix": ("x.txt", content("cache", False), "x.txt"),
    "an unknown field": ("x.json", content("sparkle", 3), "sparkle"),
    "an unknown field of a rule": ("x.json", content("rules.0.sparkle", 3), "rules.0.sparkle"),
    "no name": ("x.yaml", "rules: [{of: ['*'], weight: tensor}]", "name"),
    "no rules": ("x.yaml", "name: mine", "rules"),
    "an empty list of rules": ("x.json", content("rules", []), "rules"),
    "rules that are text": ("x.json", content("rules", "meta"), "rules"),
    "a rule without patterns": ("x.json", content("rules.0.of", []), "rules.0.of"),
    "patterns that are text": ("x.json", content("rules.0.of", "*"), "rules.0.of"),
    "an unknown grid": ("x.json", content("rules.0.weight", "row"), "rules.0.weight"),
    "unknown inputs": ("x.json", content("rules.0.inputs", "static"), "rules.0.inputs"),
    "a block of nothing": ("x.json", content("block", 0), "block"),
    "a bound of zero": ("x.json", content("bound", 0), "bound"),
    "a bound that is NaN": ("x.json", content("bound", float("nan")), "bound"),
    "a bound without end": ("x.json", content("bound", float("inf")), "bound"),
    "scales of 64 bits": ("x.json", content("scales", "fp64"), "scales"),
    "an unknown layout": ("x.json", content("layout", "gguf"), "layout"),
    "a scheme for no weight": ("x.json", content("rules.0.of", ["sparkle"]), "sparkle"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_scheme_file_is_refused(tmp_path: Path, case: str) -> None:
    name, held, names = FILES[case]
    text(name, held)(tmp_path)
    refused_and_nothing_left(
        tmp_path,
        lambda: moec.export(SPEC, precision="fp8", scheme=tmp_path / name, out=tmp_path / "out"),
        names,
    )


@pytest.mark.parametrize("source", ["sparkle", "", "x.yaml", "x" * 5000, "a\0.yaml", "."])
def test_no_such_scheme_is_refused(source: str) -> None:
    refusal(lambda: load_scheme(source), "--scheme")


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt", "fbgemm_fp8"])
def test_wide_weights_are_not_in_a_checkpoint_formats_layout(
    checkpoint: Path, tmp_path: Path, layout: str
) -> None:
    given = scheme(*EXPERTS, inputs="token", layout=layout)
    refused_and_nothing_left(
        tmp_path,
        lambda: moec.export(checkpoint, precision="fp8", scheme=given, out=tmp_path / "out"),
        layout,
    )


# ---------------------------------------------------------------- what it costs


#: By hand: 1512 weights of linear layers and experts, 540 of these of experts, 480 others. In
#: float32 a scale for each output of all (168) or of experts (66), for each tensor (16), or for
#: each block: 14 linear layers and 2 x 3 experts.
WEIGHTS = {
    None: 2 * (1512 + 480),
    "meta": 540 + 4 * 66 + 2 * (1512 - 540 + 480),
    "dynamic": 1512 + 4 * 168 + 2 * 480,
    "modelopt": 1512 + 4 * 16 + 2 * 480,
    "deepseek": 1512 + 4 * (14 + 6) + 2 * 480,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_and_caches_of_a_small_model(name: str | None) -> None:
    found = plan(SMALL, "fp8" if name else None, context=10, batch=2, scheme=name)
    assert found.weights_bytes == WEIGHTS[name]
    key_and_value = 2 * 4 * (1 if name == "modelopt" else 2)
    assert found.cache_bytes == 2 * (4 + 10) * key_and_value  # the chunk, and all
    assert found.full_cache_bytes == 2 * (10 + 10) * key_and_value


def test_scout_by_scheme() -> None:
    cost = {name: plan("scout", "fp8", context=1_048_576, scheme=name) for name in SCHEMES}
    routed, linear = 96_636_764_160, 105_696_460_800
    others = 108_641_793_536 - 850_960_896 - 20_971_520 - linear
    gate_up, down = 48 * 16 * 2 * 8192, 48 * 16 * 5120
    assert cost["meta"].weights_bytes == (
        routed + 4 * (gate_up + down) + 2 * (linear - routed + others)
    )
    tensor_scales = 4 * 48 * (4 + 2 + 3)
    assert cost["modelopt"].weights_bytes == linear + tensor_scales + 2 * others
    blocks = linear // 128**2
    assert cost["deepseek"].weights_bytes == linear + 4 * blocks + 2 * others
    assert cost["modelopt"].cache_bytes * 2 == cost["meta"].cache_bytes
    assert plan("scout", "fp8").weights_bytes == cost["dynamic"].weights_bytes


def test_an_fp8_model_is_planned_as_what_it_is() -> None:
    found = plan(small(SCHEMES["modelopt"]), context=10, batch=2)
    assert (found.precision, found.weights_bytes) == ("fp8", WEIGHTS["modelopt"])


#: what is wrong -> (spec, arguments, what the message must name)
PLANS: dict[str, tuple[ModelSpec, dict[str, Any], str]] = {
    "no such scheme": (SMALL, {"precision": "fp8", "scheme": "sparkle"}, "--scheme sparkle"),
    "a scheme of bf16": (SMALL, {"precision": "bf16", "scheme": "meta"}, "bf16"),
    "a scheme, and no precision": (SMALL, {"scheme": "meta"}, "precision"),
    "a scheme of integers": (SMALL, {"precision": "int4", "scheme": "meta"}, "int4"),
    "an FP8 model in bf16": (small(SCHEMES["meta"]), {"precision": "bf16"}, "bf16"),
    "an FP8 model in integers": (small(SCHEMES["meta"]), {"precision": "int8"}, "int8"),
    "a scheme for no weight": (SMALL, {"precision": "fp8", "scheme": scheme("x.*")}, "x.*"),
    "a scheme for an FP8 model": (small(SCHEMES["meta"]), {"scheme": "modelopt"}, "modelopt"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_bad_plan_is_refused(case: str) -> None:
    spec, arguments, names = PLANS[case]
    refusal(lambda: plan(spec, **arguments), names)
