"""A config.json that is damaged or says what moec cannot compile gives one clear message."""

from pathlib import Path

import pytest

import moec
from tests.damage import NESTED, Damage, config, drop, folder_instead, remove, text
from tests.refusals import refused_and_nothing_left

HUGE = 10**400  # an int that no float can hold

#: what is wrong -> (damage, what the message must name)
CONFIGS: dict[str, tuple[Damage, str]] = {
    # config.json as a file
    "no config": (remove("config.json"), "config.json"),
    "a config that is a folder": (folder_instead("config.json"), "config.json"),
    "an empty config": (text("config.json", ""), "config.json"),
    "a config that is no JSON": (text("config.json", '{"model_type": "llama4",}'), "config.json"),
    "a config that is a list": (text("config.json", "[{}]"), "config.json"),
    "a config that is null": (text("config.json", "null"), "config.json"),
    "a config that is no text": (text("config.json", b"\xff\xfe{}"), "config.json"),
    "a config nested without end": (text("config.json", NESTED), "config.json"),
    # its fields
    "an unknown field": (config("sparkle", 3), "sparkle"),
    "an unknown text field": (config("text_config.sparkle", 3), "text_config.sparkle"),
    "an unknown vision field": (config("vision_config.sparkle", 3), "vision_config.sparkle"),
    "an unknown rope field": (
        config("text_config.rope_scaling.sparkle", 3),
        "text_config.rope_scaling.sparkle",
    ),
    "no model_type": (drop("config.json", "model_type"), "model_type"),
    "a model_type of another family": (config("model_type", "llama3"), "'llama3'"),
    "a model_type that is a number": (config("model_type", 4), "model_type"),
    "no text_config": (drop("config.json", "text_config"), "text_config"),
    "a text_config that is a list": (config("text_config", []), "text_config"),
    "no vision_config": (drop("config.json", "vision_config"), "vision_config"),
    "text for an int": (config("text_config.hidden_size", "32"), "text_config.hidden_size"),
    "a bool for an int": (config("text_config.num_hidden_layers", True), "num_hidden_layers"),
    "a float for an int": (config("text_config.vocab_size", 256.0), "text_config.vocab_size"),
    "a list for an int": (config("vision_config.patch_size", [14]), "vision_config.patch_size"),
    "an int for a bool": (config("text_config.use_qk_norm", 1), "text_config.use_qk_norm"),
    "text for a float": (config("text_config.rope_theta", "5e5"), "text_config.rope_theta"),
    "a bool for a float": (config("text_config.rms_norm_eps", True), "text_config.rms_norm_eps"),
    "text for a token id": (config("text_config.bos_token_id", "1"), "bos"),
    "a bool for a token id": (config("text_config.pad_token_id", True), "pad"),
    "text in a list of token ids": (config("text_config.eos_token_id", ["1"]), "eos"),
    "NaN": (config("text_config.rms_norm_eps", float("nan")), "norm_eps"),
    "infinity": (config("text_config.rope_theta", float("inf")), "rope_theta"),
    "NaN in rope_scaling": (config("text_config.rope_scaling.factor", float("nan")), "factor"),
    "NaN in the vision config": (
        config("vision_config.pixel_shuffle_ratio", float("nan")),
        "pixel_shuffle_ratio",
    ),
    "a ratio without an inverse": (
        config("vision_config.pixel_shuffle_ratio", 1e-320),
        "pixel_shuffle_ratio",
    ),
    "a ratio that is no 1/n": (
        config("vision_config.pixel_shuffle_ratio", 0.4),
        "pixel_shuffle_ratio",
    ),
    "a base that angles overflow with": (config("text_config.rope_theta", 1e-45), "rope_theta"),
    "a base of images that angles overflow with": (
        config("vision_config.rope_theta", 1e-300),
        "rope_theta",
    ),
    "a factor that angles overflow with": (
        config("text_config.rope_scaling.factor", 1e-38),
        "factor",
    ),
    "a number that no float holds": (config("text_config.rope_theta", HUGE), "rope_theta"),
    "no layers": (config("text_config.num_hidden_layers", 0), "num_hidden_layers"),
    "a negative number of layers": (config("text_config.num_hidden_layers", -8), "-8"),
    "a width of zero": (config("text_config.hidden_size", 0), "hidden_size"),
    "a vision width of zero": (config("vision_config.hidden_size", 0), "hidden_size"),
    "a width of the experts of zero": (config("text_config.intermediate_size", 0), "intermediate"),
    "heads that do not divide": (config("text_config.num_key_value_heads", 3), "kv_heads 3"),
    "more experts a token than there are": (config("text_config.num_experts_per_tok", 99), "99"),
    "an image that patches do not cover": (config("vision_config.image_size", 57), "57"),
    "a quantised checkpoint": (
        config("quantization_config", {"quant_method": "fp8"}),
        "quant_method",
    ),
    "a quantised checkpoint, badly said": (config("quantization_config", "fp8"), "quantization"),
    "a quantised text model": (
        config("text_config.quantization_config", {"quant_method": "fp8"}),
        "quantization_config",
    ),
    "an unsupported activation": (config("text_config.hidden_act", "gelu"), "hidden_act"),
    "an unsupported rope_type": (config("text_config.rope_scaling.rope_type", "yarn"), "'yarn'"),
    "no rope_type": (drop("config.json", "text_config.rope_scaling.rope_type"), "rope_type"),
    "rope_scaling that is text": (config("text_config.rope_scaling", "llama3"), "rope_scaling"),
    "an unsupported dtype": (config("text_config.torch_dtype", "float8_e4m3fn"), "float8_e4m3fn"),
    "two dtypes": (config("torch_dtype", "float16"), "float16"),
    "layer_types of wrong length": (
        config("text_config.layer_types", ["full_attention"] * 7),
        "layer_types",
    ),
    "an unknown layer type": (
        config("text_config.layer_types", ["sliding_attention"] * 8),
        "'sliding_attention'",
    ),
    "layer_types that are lists": (config("text_config.layer_types", [[]] * 8), "layer_types"),
    "layer_types of two kinds": (
        config("text_config.layer_types", [1, *["full_attention"] * 7]),
        "layer_types",
    ),
    "chunked layers without a chunk": (config("text_config.attention_chunk_size", None), "chunk"),
    "no_rope_layers too short": (config("text_config.no_rope_layers", [1, 1, 1]), "no_rope_layers"),
    "no_rope_layers beside 0 and 1": (config("text_config.no_rope_layers", [2] * 8), "0 or 1"),
    "moe_layers out of range": (config("text_config.moe_layers", [0, 8]), "moe_layers"),
    "moe_layers below zero": (config("text_config.moe_layers", [-1]), "moe_layers"),
    "moe_layers that are text": (config("text_config.moe_layers", ["0"]), "moe_layers"),
    "a tower too deep": (config("vision_config.num_hidden_layers", 10**8), "1 to 512"),
    "an image token that is text": (config("image_token_index", "<|patch|>"), "image_token_index"),
    "an image token out of range": (config("image_token_index", 256), "tokens.image is 256"),
    "an image token below zero": (config("image_token_index", -1), "tokens.image is -1"),
}  # fmt: skip

#: fields that no config may leave out
REQUIRED = [
    "image_token_index",
    *(
        f"text_config.{name}"
        for name in """
        head_dim hidden_act hidden_size intermediate_size intermediate_size_mlp
        interleave_moe_layer_step max_position_embeddings num_attention_heads num_experts_per_tok
        num_hidden_layers num_key_value_heads num_local_experts rms_norm_eps rope_theta
        use_qk_norm vocab_size
        """.split()
    ),
    *(
        f"vision_config.{name}"
        for name in """
        hidden_act hidden_size image_size intermediate_size num_attention_heads num_channels
        num_hidden_layers patch_size pixel_shuffle_ratio projector_input_dim projector_output_dim
        rope_theta vision_feature_select_strategy vision_output_dim
        """.split()
    ),
]


@pytest.mark.parametrize("case", CONFIGS)
def test_a_broken_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, case: str) -> None:
    damage, names = CONFIGS[case]
    damage(checkpoint)
    refused_and_nothing_left(
        tmp_path, lambda: moec.export(checkpoint, out=tmp_path / "out", weights="copy"), names
    )


@pytest.mark.parametrize("field", REQUIRED)
def test_a_config_without_a_field_is_refused(checkpoint: Path, tmp_path: Path, field: str) -> None:
    drop("config.json", field)(checkpoint)
    refused_and_nothing_left(
        tmp_path, lambda: moec.export(checkpoint, out=tmp_path / "out"), field.split(".")[-1]
    )
