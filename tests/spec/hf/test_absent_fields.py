"""A field that a config leaves out means what it means in transformers, or is asked for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from moec.spec.errors import MoecError
from moec.spec.files import diff
from moec.spec.hf.config import read_config, write_config
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from tests.families import CASES

SCOUT = reduced(PRESETS["tiny-scout"])
MODELS = {
    "llama4": SCOUT.model_copy(update={"vision": None}),
    "llama4 with images": SCOUT,
    **{name: spec for name, spec in CASES.items() if name != "deepseek-moe"},
}
#: fields that change which tensors a model has, or their shapes: the weights tell
TOLD_BY_WEIGHTS = {"n_shared_experts", "q_lora_rank", "num_key_value_heads"}
Config = dict[str, Any]


def read(folder: Path, config: Config) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder / "config.json")


def without(config: Config) -> Iterator[tuple[str, Config]]:
    """The config without one of its fields, or of those of a part."""
    for key, value in config.items():
        yield key, {k: v for k, v in config.items() if k != key}
        if key.endswith("_config"):
            for inner, part in without(value):
                yield f"{key}.{inner}", config | {key: part}
    if "n_group" in config:
        both = ("n_group", "topk_group")
        yield " and ".join(both), {k: v for k, v in config.items() if k not in both}


@pytest.mark.parametrize("model", MODELS)
def test_an_absent_field_has_the_default_of_transformers(model: str, tmp_path: Path) -> None:
    """moec reads the config that transformers completes, and the same model without the field."""
    config, seen = write_config(MODELS[model]), 0
    for name, some in without(config):
        if name.rpartition(".")[2] in TOLD_BY_WEIGHTS or "model_type" in name:
            continue
        try:
            found = read(tmp_path, some)
        except MoecError:  # a field that moec asks for
            continue
        whole = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(some)))
        expected = read(tmp_path, json.loads(json.dumps(whole.to_dict(), default=str)))
        changed = [each for each in diff(found, expected) if not each[0].startswith("notes")]
        # transformers says which type a model has in memory; and tokens that no file names end
        # nothing in its generation, whatever the class of the config has by default
        aside = {"dtype", "tokens.bos", "tokens.eos", "tokens.pad"}
        assert not [each for each in changed if each[0] not in aside], name
        seen += 1
    assert seen > 3


def test_a_window_that_is_null_is_none(tmp_path: Path) -> None:
    config = write_config(CASES["qwen3"]) | {"use_sliding_window": True, "sliding_window": None}
    assert read(tmp_path, config).text.window is None
    del config["sliding_window"]
    assert read(tmp_path, config).text.window == 4096


def test_an_interleave_that_is_null_is_refused(tmp_path: Path) -> None:
    """transformers takes it for false, although an absent field is true there."""
    config = write_config(CASES["deepseek-v3"]) | {"rope_interleave": None}
    with pytest.raises(MoecError, match="rope_interleave"):
        read(tmp_path, config)
