"""Timing beside other libraries: what they may read of a checkpoint."""

import json
import os
import shutil
from pathlib import Path

import pytest

import moec
from moec.runtime.bench.bench import Lane, open_lane
from moec.runtime.bench.transformers import ENGINES, open_transformers
from moec.spec.errors import MoecError
from moec.weights.checkpoint import read_checkpoint
from moec.weights.random import write_random_checkpoint
from tests.damage import SPEC
from tests.refusals import refusal


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_random_checkpoint(SPEC, tmp_path / "model", seed=1)
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ENGINES)
def test_transformers_gets_no_folder_with_an_adapter(
    kind: str, model: Path, tmp_path: Path
) -> None:
    """transformers would apply it, and peft imports the module that its config names."""
    art = moec.export(model, "onnx", "fp32", tmp_path / "art").path
    named = {"peft_type": "LORA", "megatron_config": {}, "megatron_core": "model.evil"}
    (model / "adapter_config.json").write_text(json.dumps(named))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    refusal(lambda: open_lane(Lane(str(art), kind)), "an adapter beside")
    assert not (tmp_path / "mark").exists()
    open_lane(Lane(str(art), "onnxruntime", "lean"))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "pipe.safetensors"])
def test_transformers_gets_no_index_that_moec_would_refuse(
    shard: str, model: Path, tmp_path: Path
) -> None:
    """It would open a file outside of the folder, or wait for a pipe for ever."""
    keys = read_checkpoint(model).tensors
    shutil.copy(model / "model.safetensors", tmp_path / "outside.safetensors")
    os.mkfifo(model / "pipe.safetensors")
    index = {"weight_map": dict.fromkeys(keys, shard)}
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MoecError):
        open_transformers(model, ENGINES[0], "fp32", "cpu")


def test_transformers_does_not_choose_between_two_sets_of_weights(
    model: Path, tmp_path: Path
) -> None:
    """It takes the single file where the user named the index."""
    index = model / "model.safetensors.index.json"
    keys = read_checkpoint(model).tensors
    (model / "model.safetensors").rename(model / "one.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "one.safetensors")}))
    shutil.copy(model / "one.safetensors", model / "model.safetensors")
    refusal(lambda: open_transformers(index, ENGINES[0], "fp32", "cpu"), "model.safetensors")
