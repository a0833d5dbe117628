"""The quantization_config of FP8 checkpoints, as three libraries write it, to a scheme and back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from moec.spec.files import diff, load_spec
from moec.spec.hf.config import write_config
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.scheme import ATTENTION, EXPERTS, SCHEMES, Scheme
from moec.spec.tensors import quantized
from tests.damage import NESTED
from tests.families import CASES
from tests.refusals import refusal
from tests.strategies import checkpoint_specs

SPEC = reduced(PRESETS["tiny-scout"], layers=2)
OWN = "hf_quant_config.json"

ROUTED = {"layers.*.moe.gate_up", "layers.*.moe.down"}
ATTN = {f"layers.*.attn.{part}.weight" for part in "qkvo"}
LINEAR = ROUTED | ATTN | {f"layers.*.moe.shared.{x}.weight" for x in ("gate", "up", "down")}


def read(folder: Path, quantization: object = None, own: object = None) -> ModelSpec:
    """The spec of a folder whose config.json has `quantization`, with ModelOpt's `own` file."""
    config = write_config(SPEC)
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    if own is not None:
        (folder / OWN).write_text(own if isinstance(own, str) else json.dumps(own))
    return load_spec(folder)


def meaning(spec: ModelSpec) -> object:
    scheme, rules = spec.scheme, quantized(spec)
    assert scheme is not None
    kinds = {name: (rule.weight, rule.inputs) for name, rule in rules.items()}
    return scheme.layout, kinds, scheme.cache, scheme.bound


def kinds(spec: ModelSpec) -> set[str]:
    return {re.sub(r"layers\.\d+", "layers.*", name) for name in quantized(spec)}


# ---------------------------------------------------------------- there and back


@pytest.mark.full
@given(spec=checkpoint_specs())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(write_config(spec)))
    found = load_spec(folder)
    assert meaning(found) == meaning(spec)
    wide = [each.model_copy(update={"scheme": None}) for each in (found, spec)]
    assert diff(*wide) == []


def with_scheme(layout: str, weight: str, inputs: str, **more: object) -> ModelSpec:
    rules = [{"of": EXPERTS, "weight": weight, "inputs": inputs}]
    values = {"name": "mine", "layout": layout, "rules": rules, **more}
    return SPEC.model_copy(update={"scheme": Scheme.model_validate(values)})


TWO = [{"of": EXPERTS, "weight": "channel"}, {"of": ATTENTION, "weight": "expert"}]
UNSAYABLE = {
    "an artefact's own": SPEC.model_copy(update={"scheme": SCHEMES["meta"]}),
    "blocks": with_scheme("compressed-tensors", "block", "token"),
    "one scale for all experts apart": with_scheme("compressed-tensors", "tensor", "token"),
    "groups of inputs": with_scheme("compressed-tensors", "channel", "group"),
    "a bound, in compressed-tensors": with_scheme(
        "compressed-tensors", "channel", "token", bound=2.0
    ),
    "two rules": with_scheme("compressed-tensors", "channel", "none", rules=TWO),
    "channels, in modelopt": with_scheme("modelopt", "channel", "tensor"),
    "dynamic inputs, in modelopt": with_scheme("modelopt", "tensor", "token"),
    "wide inputs, in fbgemm": with_scheme("fbgemm_fp8", "channel", "none", bound=1200.0),
    "one scale a tensor, in fbgemm": with_scheme("fbgemm_fp8", "tensor", "token", bound=1200.0),
    "caches, in fbgemm": with_scheme("fbgemm_fp8", "channel", "token", bound=1200.0, cache=True),
    "no bound, in fbgemm": with_scheme("fbgemm_fp8", "channel", "token"),
}


@pytest.mark.parametrize("case", UNSAYABLE)
def test_a_scheme_that_a_format_cannot_say_is_not_written(case: str) -> None:
    refusal(lambda: write_config(UNSAYABLE[case]), "scheme")


def test_no_scheme_writes_nothing() -> None:
    assert "quantization_config" not in write_config(SPEC)


# ---------------------------------------------------------------- configs in the field


NUMBER = {"num_bits": 8, "type": "float", "symmetric": True}
GROUP = {
    "targets": ["Linear"],
    "weights": {**NUMBER, "strategy": "channel", "dynamic": False},
    "input_activations": {**NUMBER, "strategy": "token", "dynamic": True},
}
REGEX = ["re:vision_model.*", "re:multi_modal_projector.*", "re:.*lm_head", "re:.*router"]
GLOBS = ["vision_model*", "multi_modal_projector*", "*lm_head", "*router*"]
STARTS = ["vision_model", "multi_modal_projector", "language_model.lm_head", "router"]


def compressed(**more: object) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": GROUP}, "ignore": REGEX, **more,
    }  # fmt: skip


def group(**more: object) -> dict[str, Any]:
    return compressed(config_groups={"group_0": {**GROUP, **more}})


def weights(**more: object) -> dict[str, Any]:
    return group(weights={**GROUP["weights"], **more})


def inputs(**more: object) -> dict[str, Any]:
    return group(input_activations={**GROUP["input_activations"], **more})


def modelopt(**more: object) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": GLOBS, **more}


def fbgemm(**more: object) -> dict[str, Any]:
    return {"quant_method": "fbgemm_fp8", "modules_to_not_convert": STARTS, **more}


def own(**more: object) -> dict[str, Any]:
    inner = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": GLOBS, **more}
    return {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": inner}


def attention(before: str) -> list[str]:
    """The modules of all attention, one by one, with a prefix."""
    return [f"{before}layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkvo"]


#: how it is said -> (quantization_config, what is quantised)
SAID: dict[str, tuple[dict[str, Any], set[str]]] = {
    "compressed-tensors": (compressed(), LINEAR),
    "expressions": (
        compressed(ignore=[*REGEX, "re:.*self_attn.*", "re:.*shared_expert.*"]),
        ROUTED,
    ),
    "expressions over all": (compressed(ignore=[*REGEX, r"re:^(?!.*experts\.\d+).*$"]), ROUTED),
    "names": (compressed(ignore=[*REGEX, *attention("language_model.model.")]), LINEAR - ATTN),
    "names without language_model": (
        compressed(ignore=[*REGEX, *attention("model.")]),
        LINEAR - ATTN,
    ),
    "names that begin with model": (
        compressed(ignore=[*REGEX, *attention("model.language_model.model.")]),
        LINEAR - ATTN,
    ),
    "expressions that begin with model": (
        compressed(ignore=[*REGEX, r"re:model\.language_model\..*self_attn.*"]),
        LINEAR - ATTN,
    ),
    "a bare lm_head": (compressed(ignore=[*REGEX[:2], "lm_head", "re:.*router"]), LINEAR),
    "targets by expression": (group(targets=[r"re:.*feed_forward\.experts.*"]), ROUTED),
    "targets by name": (group(targets=attention("language_model.model.")), ATTN),
    "targets by class and name": (group(targets=["Linear", "lm_head"]), LINEAR),
    "modelopt": (modelopt(), LINEAR),
    "globs": (modelopt(ignore=[*GLOBS, "*self_attn*", "*.shared_expert.*"]), ROUTED),
    "globs of a start": (
        modelopt(ignore=[*GLOBS, *(f"language_model.model.layers.{i}.self_attn*" for i in (0, 1))]),
        LINEAR - ATTN,
    ),
    "globs that begin with model": (
        modelopt(ignore=[*GLOBS, "model.language_model.*self_attn*"]),
        LINEAR - ATTN,
    ),
    "exclude_modules beside ignore": (
        modelopt(exclude_modules=["*self_attn*"]),
        LINEAR - ATTN,
    ),
    "fbgemm": (fbgemm(), LINEAR),
    "ends of names": (
        fbgemm(modules_to_not_convert=[*STARTS, *(f"{x}_proj" for x in "qkvo")]),
        LINEAR - ATTN,
    ),
    "starts of names": (
        fbgemm(modules_to_not_convert=[*STARTS, *(f"model.layers.{i}.self_attn" for i in (0, 1))]),
        LINEAR - ATTN,
    ),
    "starts as expressions": (
        fbgemm(modules_to_not_convert=[*STARTS, r"language_model.*\.self_attn"]),
        LINEAR - ATTN,
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_left_out_stays_wide(tmp_path: Path, case: str) -> None:
    said, expected = SAID[case]
    assert kinds(read(tmp_path, said)) == expected


def test_a_single_layer_is_left_out(tmp_path: Path) -> None:
    name = "language_model.model.layers.1.self_attn.q_proj"
    for said in (
        compressed(ignore=[*REGEX, name]),
        modelopt(ignore=[*GLOBS, name]),
        fbgemm(modules_to_not_convert=[*STARTS, name]),
    ):
        rules = quantized(read(tmp_path, said))
        assert "layers.0.attn.q.weight" in rules and "layers.1.attn.k.weight" in rules
        assert "layers.1.attn.q.weight" not in rules


def test_layer_1_is_not_layer_10(tmp_path: Path) -> None:
    deep = reduced(PRESETS["scout"], layers=12)
    start = "language_model.model.layers.1"
    config = write_config(deep) | {
        "quantization_config": fbgemm(modules_to_not_convert=[*STARTS, start])
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    rules = quantized(load_spec(tmp_path))
    layers = {int(name.split(".")[1]) for name in rules}
    assert layers == set(range(12)) - {1}


#: how it is said -> (quantization_config, weights, inputs, caches, bound)
MEANT: dict[str, tuple[dict[str, Any], str, str, bool, float | None]] = {
    "compressed-tensors": (compressed(), "channel", "token", False, None),
    "a scale for each layer": (weights(strategy="tensor"), "expert", "token", False, None),
    "weights alone": (group(input_activations=None), "channel", "none", False, None),
    "caches, in compressed-tensors": (
        compressed(kv_cache_scheme={**NUMBER, "strategy": "tensor", "dynamic": False}),
        "channel", "token", True, None,
    ),
    "modelopt": (modelopt(), "tensor", "tensor", False, None),
    "caches, in modelopt": (
        modelopt(kv_cache_scheme={"dynamic": False, "num_bits": 8, "type": "float"}),
        "tensor", "tensor", True, None,
    ),
    "caches by name": (modelopt(kv_cache_quant_algo="FP8"), "tensor", "tensor", True, None),
    "fbgemm": (fbgemm(), "channel", "token", False, 1200.0),
    "a bound": (fbgemm(activation_scale_ub=7), "channel", "token", False, 7.0),
}  # fmt: skip


@pytest.mark.parametrize("case", MEANT)
def test_scales_and_caches(tmp_path: Path, case: str) -> None:
    said, *expected = MEANT[case]
    scheme = read(tmp_path, said).scheme
    assert scheme is not None and scheme.layout == said["quant_method"]
    (rule,) = scheme.rules
    assert [rule.weight, rule.inputs, scheme.cache, scheme.bound] == expected


#: what the libraries write beside that, without an effect
_CT_NOTES: dict[str, Any] = {
    "actorder": None, "block_structure": None, "group_size": None, "observer": "minmax",
    "observer_kwargs": {}, "scale_dtype": None, "zp_dtype": None,
}  # fmt: skip
INERT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "compressed-tensors": (
        compressed(),
        compressed(
            config_groups={
                "group_0": {
                    **GROUP,
                    "weights": {**GROUP["weights"], **_CT_NOTES},
                    "input_activations": {**GROUP["input_activations"], **_CT_NOTES},
                    "output_activations": None,
                    "format": "float-quantized",
                }
            },
            global_compression_ratio=1.2, kv_cache_scheme=None, quantization_status="compressed",
            transform_config={}, version="0.11.0",
            sparsity_config={"format": "dense", "global_sparsity": 0.1, "targets": []},
        ),
    ),
    "modelopt": (
        modelopt(),
        modelopt(
            config_groups={
                "group_0": {
                    "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                    "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
                    "targets": ["Linear"],
                }
            },
            producer={"name": "modelopt", "version": "0.29.0"}, kv_cache_quant_algo=None,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INERT)
def test_notes_of_the_writer_change_nothing(tmp_path: Path, case: str) -> None:
    plain, noted = INERT[case]
    assert meaning(read(tmp_path, noted)) == meaning(read(tmp_path, plain))


# ---------------------------------------------------------------- ModelOpt's own file


@pytest.mark.parametrize("cache", [None, "FP8"])
def test_the_own_file_alone_says_it(tmp_path: Path, cache: str | None) -> None:
    found = read(tmp_path, own=own(kv_cache_quant_algo=cache, group_size=None))
    assert kinds(found) == LINEAR
    cached = {"num_bits": 8, "type": "float"} if cache else None
    assert meaning(found) == meaning(read(tmp_path, modelopt(kv_cache_scheme=cached)))


def test_both_files_are_one_word(tmp_path: Path) -> None:
    alone = read(tmp_path, modelopt(kv_cache_quant_algo="FP8"))
    assert meaning(read(tmp_path, modelopt(kv_cache_quant_algo="FP8"), own())) == meaning(alone)


def test_config_json_goes_before_a_broken_own_file(tmp_path: Path) -> None:
    assert kinds(read(tmp_path, compressed(), "{")) == LINEAR


def test_without_either_there_is_no_scheme(tmp_path: Path) -> None:
    assert read(tmp_path).scheme is None


# ---------------------------------------------------------------- refusals


AT, IN = "config.json: quantization_config", f"{OWN}: quantization"
G0 = f"{AT}.config_groups.group_0"

#: what is wrong -> (quantization_config, the file and field that the message must name)
CONFIGS: dict[str, tuple[object, str]] = {
    # its kind
    "a list": ([1], AT),
    "text": ("fp8", AT),
    "a number": (8, AT),
    "empty": ({}, f"{AT}.quant_method"),
    "no method": ({"bits": 8}, f"{AT}.quant_method"),
    "a method that is a number": ({"quant_method": 8}, f"{AT}.quant_method"),
    "an unknown method": ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
    "DeepSeek's method": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        f"{AT}.quant_method",
    ),
    # compressed-tensors
    "no format": (compressed(format=None), f"{AT}.format"),
    "FP8, packed": (
        {**group(input_activations=None), "format": "pack-quantized"},
        f"{G0}.weights.num_bits",
    ),
    "int8": (compressed(format="int-quantized"), f"{AT}.format"),
    "another format, in the group": (group(format="nvfp4-pack-quantized"), f"{G0}.format"),
    "no groups": (compressed(config_groups={}), f"{AT}.config_groups"),
    "groups that are a list": (compressed(config_groups=[GROUP]), f"{AT}.config_groups"),
    "two groups": (compressed(config_groups={"a": GROUP, "b": GROUP}), f"{AT}.config_groups"),
    "a preset's name as the group": (
        compressed(config_groups={"FP8_DYNAMIC": ["Linear"]}),
        f"{AT}.config_groups.FP8_DYNAMIC",
    ),
    "a group that is text": (compressed(config_groups={"group_0": "x"}), G0),
    "a group that is null": (compressed(config_groups={"group_0": None}), G0),
    "no targets": (group(targets=None), f"{G0}.targets"),
    "targets that are text": (group(targets="Linear"), f"{G0}.targets"),
    "no weights": (group(weights=None), f"{G0}.weights"),
    "weights that are a list": (group(weights=[]), f"{G0}.weights"),
    "4 bits": (weights(num_bits=4), f"{G0}.weights.num_bits"),
    "integers": (weights(type="int"), f"{G0}.weights.type"),
    "asymmetric weights": (weights(symmetric=False), f"{G0}.weights.symmetric"),
    "dynamic weights": (weights(dynamic=True), f"{G0}.weights.dynamic"),
    "groups of weights": (
        weights(strategy="group", group_size=128),
        f"{G0}.weights.strategy",
    ),
    "blocks that are not square": (
        weights(strategy="block", block_structure=[128, 64]),
        f"{G0}.weights.block_structure",
    ),
    "no strategy": (weights(strategy=None), f"{G0}.weights.strategy"),
    "an unknown field of weights": (weights(sparkle=3), f"{G0}.weights.sparkle"),
    "static inputs, a scale for each token": (
        inputs(dynamic=False),
        f"{G0}.input_activations.strategy",
    ),
    "inputs that are static by default": (
        inputs(dynamic=None),
        f"{G0}.input_activations.strategy",
    ),
    "static groups": (
        group(
            weights={**GROUP["weights"], "strategy": "block", "block_structure": [128, 128]},
            input_activations={
                **GROUP["input_activations"],
                "strategy": "group",
                "group_size": 128,
                "dynamic": False,
            },
        ),
        f"{G0}.input_activations.dynamic",
    ),
    "locally dynamic inputs": (inputs(dynamic="local"), f"{G0}.input_activations.dynamic"),
    "one scale for a batch": (inputs(strategy="tensor"), f"{G0}.input_activations.strategy"),
    "integer inputs": (inputs(type="int"), f"{G0}.input_activations.type"),
    "rounded outputs": (
        group(output_activations={**NUMBER, "strategy": "tensor", "dynamic": False}),
        f"{G0}.output_activations",
    ),
    "transforms": (
        compressed(transform_config={"config_groups": {"u": {"type": "hadamard", "apply": []}}}),
        f"{AT}.transform_config",
    ),
    "sparse weights": (
        compressed(sparsity_config={"format": "sparse-24-bitmask"}),
        f"{AT}.sparsity_config",
    ),
    "integer caches": (
        compressed(kv_cache_scheme={**NUMBER, "type": "int"}),
        f"{AT}.kv_cache_scheme",
    ),
    "4-bit caches": (compressed(kv_cache_scheme={**NUMBER, "num_bits": 4}), "kv_cache_scheme"),
    "dynamic caches": (
        compressed(kv_cache_scheme={**NUMBER, "dynamic": True}),
        f"{AT}.kv_cache_scheme",
    ),
    "caches with a scale for each head": (
        compressed(kv_cache_scheme={**NUMBER, "strategy": "attn_head"}),
        f"{AT}.kv_cache_scheme",
    ),
    "ignore that is text": (compressed(ignore="lm_head"), f"{AT}.ignore"),
    "ignore with a number": (compressed(ignore=[*REGEX, 3]), f"{AT}.ignore"),
    "a broken expression": (compressed(ignore=["re:(lm_head"]), f"{AT}.ignore"),
    "a broken expression in targets": (group(targets=["re:*x"]), f"{G0}.targets"),
    "an expression beyond all bounds": (
        compressed(ignore=["re:a{99999999999}"]),
        f"{AT}.ignore",
    ),
    "an expression nested without end": (
        compressed(ignore=["re:" + "(" * 20_000]),
        f"{AT}.ignore",
    ),
    "all ignored": (compressed(ignore=["Linear"]), f"{AT}.ignore"),
    "no target": (group(targets=["Conv2d"]), AT),
    "gate and up alone": (compressed(ignore=[*REGEX, "re:.*down_proj"]), AT),
    "an expert in part": (
        compressed(ignore=[*REGEX, "model.layers.0.feed_forward.experts.3.up_proj"]),
        AT,
    ),
    "an unknown field": (compressed(sparkle=3), f"{AT}.sparkle"),
    # ModelOpt
    "no algorithm": (modelopt(quant_algo=None), f"{AT}.quant_algo"),
    "NVFP4": (modelopt(quant_algo="NVFP4", group_size=16), f"{AT}.quant_algo"),
    "NVFP4, and what is supported": (modelopt(quant_algo="NVFP4"), "expected: 'FP8'"),
    "FP8 by channel": (modelopt(quant_algo="FP8_PER_CHANNEL_PER_TOKEN"), f"{AT}.quant_algo"),
    "mixed precision": (modelopt(quant_algo="MIXED_PRECISION"), f"{AT}.quant_algo"),
    "other caches": (modelopt(kv_cache_quant_algo="INT8"), f"{AT}.kv_cache_quant_algo"),
    "integer caches, in modelopt": (
        modelopt(kv_cache_scheme={"num_bits": 8, "type": "int"}),
        f"{AT}.kv_cache_scheme",
    ),
    "exclude_modules that are text": (
        modelopt(exclude_modules="lm_head"),
        f"{AT}.exclude_modules",
    ),
    "all ignored, in modelopt": (modelopt(ignore=["*"]), f"{AT}.ignore"),
    "an unknown field, in modelopt": (modelopt(sparkle=3), f"{AT}.sparkle"),
    # fbgemm
    "a bound of zero": (fbgemm(activation_scale_ub=0), f"{AT}.activation_scale_ub"),
    "a bound below zero": (fbgemm(activation_scale_ub=-1.0), f"{AT}.activation_scale_ub"),
    "a bound that is NaN": (
        fbgemm(activation_scale_ub=float("nan")),
        f"{AT}.activation_scale_ub",
    ),
    "a bound that is text": (fbgemm(activation_scale_ub="1200"), f"{AT}.activation_scale_ub"),
    "modules that are text": (
        fbgemm(modules_to_not_convert="lm_head"),
        f"{AT}.modules_to_not_convert",
    ),
    "a broken expression, in fbgemm": (
        fbgemm(modules_to_not_convert=["(lm_head"]),
        f"{AT}.modules_to_not_convert",
    ),
    "all left out, in fbgemm": (
        fbgemm(modules_to_not_convert=["language_model", "vision_model", "multi_modal_projector"]),
        f"{AT}.modules_to_not_convert",
    ),
    "an unknown field, in fbgemm": (fbgemm(sparkle=3), f"{AT}.sparkle"),
}

#: the same for ModelOpt's own file
OWN_FILES: dict[str, tuple[object, str]] = {
    "broken JSON": ("{", OWN),
    "empty": ("", OWN),
    "a list": ([own()], OWN),
    "nested without end": (NESTED, OWN),
    "without quantization": ({"producer": {}}, IN),
    "quantization that is a list": ({"quantization": []}, IN),
    "no algorithm": (own(quant_algo=None), f"{IN}.quant_algo"),
    "NVFP4": (own(quant_algo="NVFP4", group_size=16), f"{IN}.quant_algo"),
    "other caches": (own(kv_cache_quant_algo="NVFP4"), f"{IN}.kv_cache_quant_algo"),
    "caches that are a flag": (own(kv_cache_quant_algo=True), f"{IN}.kv_cache_quant_algo"),
    "modules that are text": (own(exclude_modules="lm_head"), f"{IN}.exclude_modules"),
    "all left out": (own(exclude_modules=["*"]), f"{IN}.exclude_modules"),
    "an unknown field": (own(sparkle=3), f"{IN}.sparkle"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_not_supported_is_refused(tmp_path: Path, case: str) -> None:
    said, names = CONFIGS[case]
    refusal(lambda: quantized(read(tmp_path, said)), names)


@pytest.mark.parametrize("case", OWN_FILES)
def test_a_bad_own_file_is_refused(tmp_path: Path, case: str) -> None:
    said, names = OWN_FILES[case]
    refusal(lambda: quantized(read(tmp_path, own=said)), names)


def test_heads_of_latent_attention_in_4_bits_are_refused() -> None:
    """No product of 4-bit integers takes the heads of kv_b_proj one by one."""
    plain = CASES["deepseek-v3"]
    rule = {"of": ["layers.*.attn.kv_up.weight"], "weight": "group", "inputs": "none"}
    values = {"name": "w4", "layout": "pack-quantized", "block": 8, "rules": [rule]}
    spec = plain.model_copy(update={"scheme": Scheme.model_validate(values)})
    refusal(lambda: quantized(spec), "kv_b_proj")
