import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from transformers import AutoConfig, Llama4Config, Llama4TextConfig

from moec.spec.errors import MoecError
from moec.spec.files import diff, load_spec
from moec.spec.hf.architectures.llama4.read import PUBLISHED
from moec.spec.hf.config import read_config, write_config
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from tests.conftest import TINY
from tests.refusals import refusal
from tests.strategies import specs


def _read(folder: Path, config: dict[str, Any]) -> ModelSpec:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return read_config(path)


def _released() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((TINY / "config.json").read_text())
    return config


def test_the_released_style_gives_the_preset() -> None:
    assert diff(load_spec(TINY), PRESETS["tiny-scout"]) == []


def test_the_style_that_transformers_5_writes_gives_the_same_spec(tmp_path: Path) -> None:
    Llama4Config.from_pretrained(TINY).save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert "rope_parameters" in text and "rope_theta" not in text
    assert diff(load_spec(tmp_path), PRESETS["tiny-scout"]) == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip(name: str, tmp_path: Path) -> None:
    assert [
        row[0] for row in diff(_read(tmp_path, write_config(PRESETS[name])), PRESETS[name])
    ] in (
        ["provenance"],
        [],
    )


@given(spec=specs())
def test_random_specs_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec
) -> None:
    assert diff(_read(tmp_path_factory.mktemp("spec"), write_config(spec)), spec) == []


@given(spec=specs())
def test_transformers_understands_what_we_write(spec: ModelSpec) -> None:
    config = Llama4TextConfig(**{k: v for k, v in write_config(spec).items() if k != "torch_dtype"})
    text = spec.text
    assert config.no_rope_layers == [int(layer.rope) for layer in text.all_layers]
    assert config.moe_layers == [layer.index for layer in text.all_layers if layer.moe]
    assert config.rope_parameters["rope_theta"] == text.rope_theta


#: how configs say that no layer has experts
DENSE: dict[str, dict[str, Any]] = {
    "the released Llama Guard 4": {
        "num_local_experts": 0, "interleave_moe_layer_step": 0, "moe_layers": [],
    },
    "none for a token either": {
        "num_local_experts": 0, "num_experts_per_tok": 0, "moe_layers": [], "intermediate_size": 0,
    },
    "numbers of experts that nobody has": {"num_local_experts": 16, "moe_layers": []},
    "a step beyond the last layer": {"num_local_experts": 0, "interleave_moe_layer_step": 9},
}  # fmt: skip


@pytest.mark.parametrize("case", DENSE)
def test_a_config_without_experts(tmp_path: Path, case: str) -> None:
    config = _released()
    config["text_config"] |= DENSE[case]
    spec = _read(tmp_path, config)
    assert (spec.text.ffn, spec.text.experts, spec.text.dense_hidden) == ("D", None, 128)
    assert diff(_read(tmp_path, write_config(spec)), spec) == []
    text = Llama4Config(**write_config(spec)).text_config
    assert (text.moe_layers, text.intermediate_size_mlp, text.num_local_experts) == ([], 128, 0)
    for name in ("num_local_experts", "num_experts_per_tok", "intermediate_size"):
        config["text_config"].pop(name, None)
    assert diff(_read(tmp_path, config), spec) == []


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_local_experts": 0}, "although there are MoE layers"),
        ({"num_local_experts": 0, "interleave_moe_layer_step": 0}, "moe_layers: []"),
    ],
)
def test_a_config_that_is_unsure_of_its_experts(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    config = _released()
    config["text_config"] |= changes
    with pytest.raises(MoecError, match=re.escape(said)):
        _read(tmp_path, config)


def test_a_chunk_of_null_means_that_no_layer_is_chunked(tmp_path: Path) -> None:
    config = _released()
    config["text_config"] |= {"attention_chunk_size": None}
    spec = _read(tmp_path, config)
    assert (spec.text.attention, spec.text.chunk, spec.text.rope) == ("G", None, "RRRN")
    assert any("attention_chunk_size is null" in note for note in spec.notes)
    written = write_config(spec)
    assert diff(_read(tmp_path, written), spec) == []
    assert Llama4Config(**written).text_config.attention_chunk_size == 2048  # of all positions


def test_launch_week_oddities(tmp_path: Path) -> None:
    config = _released()
    text = config["text_config"]
    text["attn_temperature_tuning"] = 4
    text["rope_scaling"] |= {"factor": 8.0, "high_freq_factor": 4.0}
    text["for_llm_compressor"] = False
    text["_attn_implementation_autoset"] = True
    spec = _read(tmp_path, config)
    assert spec.text.temperature == "---T"
    assert spec.text.rope_scaling is not None and spec.text.rope_scaling.high == 4.0
    assert "launch week" in spec.notes[0]


def test_fields_that_released_configs_leave_out_have_their_published_meaning(
    tmp_path: Path,
) -> None:
    config = _released()
    for field in PUBLISHED:
        config["text_config"].pop(field, None)
    spec = _read(tmp_path, config)
    assert spec.text.temperature_floor == 8192
    assert (spec.text.temperature, spec.text.rope) == ("---T", "RRRN")
    for field, value in PUBLISHED.items():
        assert getattr(Llama4TextConfig(), field) == value


def test_patterns_that_no_config_can_say_are_refused() -> None:
    text = PRESETS["scout"].text.model_copy(update={"temperature": "T"})
    with pytest.raises(MoecError, match="spec file"):
        write_config(PRESETS["scout"].model_copy(update={"text": text}))


@pytest.mark.parametrize("interval, pattern", [(2, "RN"), (4, "RRRN"), (1, "N")])
def test_the_default_pattern_follows_the_interval(
    tmp_path: Path, interval: int, pattern: str
) -> None:
    config = _released()
    config["text_config"]["no_rope_layer_interval"] = interval
    assert _read(tmp_path, config).text.rope == pattern


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {**_YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 2.0}


@pytest.mark.parametrize(
    ("preset", "scaling"),
    [
        ("deepseek-v3", _YARN),
        ("deepseek-v3", {**_YARN, "rope_theta": 77.0}),
        ("tiny-scout", _LLAMA3),
        ("qwen3-30b-a3b", {}),
        ("aria", None),
        ("mixtral-8x7b", {"type": "default"}),
    ],
)
@pytest.mark.parametrize("inner", [{"rope_theta": 55.0}, {}])
def test_rope_scaling_beside_rope_parameters_counts_as_in_transformers(
    preset: str, scaling: dict[str, Any] | None, inner: dict[str, Any], tmp_path: Path
) -> None:
    spec = PRESETS[preset].model_copy(update={"vision": None})
    config = write_config(spec)
    text = config.get("text_config", config)
    both = {"rope_type": "default", **inner}
    text |= {"rope_theta": 99.0, "rope_scaling": scaling, "rope_parameters": both}
    ours = _read(tmp_path, config).text
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert ours.rope_theta == theirs["rope_theta"]
    assert getattr(ours.rope_scaling, "factor", None) == theirs.get("factor")


@pytest.mark.parametrize(
    ("preset", "scaling", "named"),
    [
        ("qwen3-30b-a3b", _YARN, "rope_scaling: rope_type"),
        ("olmoe-1b-7b", {"type": "linear", "factor": 2.0}, "rope_scaling: rope_type"),
        ("deepseek-v3", {**_YARN, "sparkle": 1}, "rope_scaling: sparkle"),
        ("deepseek-v3", [1], "rope_scaling"),
    ],
)
def test_rope_scaling_beside_rope_parameters_is_refused_as_it_is_alone(
    preset: str, scaling: Any, named: str, tmp_path: Path
) -> None:
    config = write_config(PRESETS[preset]) | {"rope_scaling": scaling}
    for parameters in (None, {"rope_type": "default", "rope_theta": 1e4}):
        refusal(lambda: _read(tmp_path, config | {"rope_parameters": parameters}), named)  # noqa: B023


def test_yarn_without_turns_is_refused(tmp_path: Path) -> None:
    """It divides by the logarithm of the base. Without YaRN, a base of 1 is a model."""
    config = write_config(PRESETS["deepseek-v3"]) | {"rope_theta": 1.0}
    assert _read(tmp_path, config | {"rope_scaling": None}).text.rope_theta == 1
    refusal(lambda: _read(tmp_path, config | {"rope_scaling": _YARN}), "rope_theta is 1")


def test_rope_scaling_without_a_base_is_refused_beside_rope_parameters(tmp_path: Path) -> None:
    config = write_config(PRESETS["deepseek-v3"])
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    refusal(lambda: _read(tmp_path, config), "rope_theta")
