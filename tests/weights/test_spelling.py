"""Checkpoints as tools save them: the same model, other keys."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import moec
from moec.spec.hf.config import write_config
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.name_map import checkpoint_tensors, read_model
from tests.refusals import refusal

Tensors = dict[str, Tensor]
SPEC = reduced(PRESETS["tiny-scout"], 4)
TEXT = SPEC.model_copy(update={"vision": None})
TIED = TEXT.model_copy(update={"text": TEXT.text.model_copy(update={"tie_embeddings": True})})
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _tensors(spec: moec.ModelSpec) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        row.key: torch.randn(row.shape, generator=generator).mul(0.05).bfloat16()
        for row in checkpoint_tensors(spec)
    }


def _write(folder: Path, spec: moec.ModelSpec, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(spec) | config))
    plain = {key: each.contiguous() for key, each in tensors.items()}
    save_file(plain, folder / "model.safetensors")
    return folder


def _logits(folder: Path) -> Tensor:
    return torch.as_tensor(moec.open_session(folder).logits([[1, 2, 3, 4, 5, 6, 7]]))


def _buffers(tensors: Tensors) -> Tensors:
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.original_inv_freq": torch.ones(4),
        "freqs_cis": torch.ones(4, 2),
    }
    return tensors | more


def _prefixed(tensors: Tensors) -> Tensors:
    return {f"language_model.{key}": each for key, each in tensors.items()}


@pytest.mark.parametrize(
    "spec, change, note",
    [
        (TEXT, _buffers, "4 buffers"),
        (TEXT, _prefixed, ""),
        (TIED, lambda each: each | {HEAD: each[EMBED].clone()}, "tied"),
        (TIED, lambda each: _prefixed(_buffers(each | {HEAD: each[EMBED].clone()})), "tied"),
    ],
    ids=["buffers", "prefix", "tied head", "all of them"],
)
def test_it_is_the_same_model(
    spec: moec.ModelSpec, change: Callable[[Tensors], Tensors], note: str, tmp_path: Path
) -> None:
    plain = _write(tmp_path / "plain", spec, _tensors(spec))
    other = _write(tmp_path / "other", spec, change(_tensors(spec)))
    assert (_logits(other) == _logits(plain)).all()
    notes = read_model(other)[0].notes
    assert any(note in each for each in notes) if note else not notes
    art = moec.export(other, out=tmp_path / "art")
    assert art.manifest.weights.mode == "in-place"
    assert (_logits(art.path) - _logits(plain)).abs().max() < 1e-4


def test_a_tower_that_only_the_config_has(tmp_path: Path) -> None:
    plain = _write(tmp_path / "plain", TEXT, _tensors(TEXT))
    found = _prefixed(_tensors(TEXT))
    other = _write(tmp_path / "other", SPEC, found)
    spec = read_model(other)[0]
    assert spec.vision is None and "vision_config" in spec.notes[-1]
    assert (_logits(other) == _logits(plain)).all()
    tower = next(row for row in checkpoint_tensors(SPEC) if row.key.startswith("vision_model."))
    half = found | {tower.key: torch.zeros(tower.shape).bfloat16()}
    broken = _write(tmp_path / "broken", SPEC, half)  # a part of the tower is no text model
    refusal(lambda: read_model(broken), "no such tensor")


def test_a_tied_head_that_is_another_is_refused(tmp_path: Path) -> None:
    tensors = _tensors(TIED)
    head = tensors[EMBED].clone()
    head[3, 4] += 1
    folder = _write(tmp_path / "a", TIED, tensors | {HEAD: head})
    refusal(lambda: read_model(folder), "tie_word_embeddings")
    missing = {key: each for key, each in _tensors(TEXT).items() if key != HEAD}
    refusal(lambda: read_model(_write(tmp_path / "b", TEXT, missing)), "tie_word_embeddings")
    odd = _write(tmp_path / "c", TEXT, _tensors(TEXT) | {"model.layers.0.other": torch.ones(4)})
    refusal(lambda: read_model(odd), "model.layers.0.other")


def test_fields_that_change_nothing_are_left_aside(tmp_path: Path) -> None:
    more = {"unsloth_version": "2026.1", "model_name": "x", "some_new_field": None}
    folder = _write(tmp_path / "a", TEXT, _tensors(TEXT), **more)
    assert "model_name, unsloth_version" in read_model(folder)[0].notes[0]
    odd = _write(tmp_path / "b", TEXT, _tensors(TEXT), some_new_field=3)
    refusal(lambda: read_model(odd), "some_new_field")


def test_the_old_spelling_of_rope_scaling(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", TEXT, _tensors(TEXT))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    scaling = config["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    wanted = read_model(folder)[0].text.rope_scaling
    scaling["type"] = scaling.pop("rope_type")
    file.write_text(json.dumps(config))
    assert read_model(folder)[0].text.rope_scaling == wanted
