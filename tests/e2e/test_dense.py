"""Llama 4 without any expert: with a tower as Llama Guard 4, and text alone with a tied head."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration

import moec
from moec.artefact.engine_options import EngineOptions
from moec.runtime.calibrate import calibrate
from moec.spec.model import ModelSpec
from moec.weights.random import write_random_checkpoint
from tests.oracle import relative
from tests.proofs import assert_passed
from tests.small import SMALL

pytestmark = pytest.mark.full

TEXT = SMALL.text.model_dump() | {"ffn": "D", "tie_embeddings": True, "max_positions": 64}
DENSE = ModelSpec.model_validate(
    SMALL.model_dump() | {"name": "dense", "vision": None, "text": TEXT}
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "dense"
    write_random_checkpoint(DENSE, folder, seed=4)
    return folder


@pytest.mark.parametrize(
    "target, precision, scheme",
    [
        ("onnx", "fp8", "dynamic"),
        pytest.param("torch", "fp8", "dynamic", marks=pytest.mark.slow),
        pytest.param("tensorrt", "bf16", None, marks=pytest.mark.slow),
        ("tensorrt", "fp8", "static"),
        pytest.param("ort", "fp8", "dynamic", marks=pytest.mark.slow),
        pytest.param("ort", "int8", None, marks=pytest.mark.slow),
        pytest.param("ort", "int4", None, marks=pytest.mark.slow),
        pytest.param("tensorrt-rtx", "bf16", None, marks=pytest.mark.slow),
    ],
)
def test_every_target_and_precision_is_proven(
    target: str, precision: str, scheme: str | None, dense: Path, tmp_path: Path
) -> None:
    """Targets whose default scheme quantises experts have another one here."""
    tokens = torch.randint(0, DENSE.text.vocab, (4, 24))
    scales = calibrate(dense, tokens) if scheme == "static" else None
    options = EngineOptions(build=target == "tensorrt-rtx") if "tensorrt" in target else None
    art = moec.export(dense, target, precision, tmp_path / "art", scales=scales, options=options)
    assert (art.manifest.spec.scheme and art.manifest.spec.scheme.name) == scheme
    proof = moec.validate(art.path, tokens=19)
    assert_passed(proof)
    assert not any("router" in check.name for check in proof.checks)


def test_a_build_without_weights_is_proven_on_its_twin(tmp_path: Path) -> None:
    art = moec.export(DENSE, "ort", "int4", tmp_path / "art")
    proof = moec.validate(art.path, tokens=19)
    assert_passed(proof)
    assert proof.twin and "of width 128, chunk 8" in proof.notes[-1]


def test_the_released_config_of_llama_guard_4_gives_the_logits_of_transformers(
    tmp_path: Path,
) -> None:
    """No experts, and a chunk of null, with which transformers 4.51 masked nothing but the future.

    Later ones refuse to run it, so the oracle gets a chunk that no row fills.
    """
    spec = ModelSpec.model_validate(
        SMALL.model_dump()
        | {"name": "guard", "text": TEXT | {"attention": "G", "tie_embeddings": False}}
    )
    assert spec.vision  # transformers ties two of the tower's widths to each other
    tower = spec.vision.model_copy(update={"hidden": spec.vision.shuffled_dim})
    spec, folder = spec.model_copy(update={"vision": tower}), tmp_path / "guard"
    write_random_checkpoint(spec, folder, seed=5)
    model = Llama4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    assert isinstance(model.config, Llama4Config) and model.config.text_config.moe_layers == []
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text |= {"num_experts_per_tok": 1, "attention_chunk_size": None}
    del text["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    tile = torch.rand(1, tower.channels, tower.image, tower.image)
    ids = torch.randint(6, spec.text.vocab, (1, 21))
    ids[:, 3 : 3 + tower.tokens] = spec.tokens.image
    with torch.inference_mode():
        expected = model(ids, pixel_values=tile, use_cache=False).logits
    session = moec.open_session(moec.export(folder, "ort", "fp32", tmp_path / "art").path)
    assert relative(session.logits(ids, pixel_values=tile), expected) < 1e-4
