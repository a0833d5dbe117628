"""Models whose features fused ops lack, through target torch: the command line and checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moec
from moec.artefact.artefact import open_artefact
from moec.exporters.torch.program import part_graph
from moec.graph_builder import ops
from moec.runtime.proof.compare import FP8_NOISE
from moec.spec.hf.quantization import read_scheme
from moec.weights.joined import PLAIN
from moec.weights.random import write_random_checkpoint
from tests.conftest import run_command
from tests.families import CASES
from tests.oracle import transformers_logits
from tests.proofs import assert_passed

pytestmark = pytest.mark.full

Cli = Callable[..., tuple[int, str]]
#: DeepSeek's own format, with small blocks
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


@pytest.mark.parametrize(
    "case, precision",
    [("olmoe", "fp32"), pytest.param("aria", "bf16", marks=pytest.mark.slow)],
)
def test_the_command_line(case: str, precision: str, tmp_path: Path, cli: Cli) -> None:
    """What is generated is what transformers' logits say, one token after another."""
    write_random_checkpoint(CASES[case], tmp_path / "weights", seed=5)
    art, prompt = tmp_path / "art", [7, 9, 200, 31, 5]
    build = ("build", "--checkpoint", tmp_path / "weights", "--target", "torch")
    assert cli(*build, "--precision", precision, "--out", art) == (0, "")
    manifest = open_artefact(art).manifest
    assert_passed(manifest.parity)
    assert manifest.dialect == PLAIN and manifest.parity["engine"] == "torch"
    assert cli("validate", art) == (0, "") and cli("inspect", art, "--verify") == (0, "")
    ids = ",".join(map(str, prompt))
    code, out, err = run_command("generate", art, "--ids", ids, "--max-new-tokens", 6)
    assert (code, err) == (0, "")
    said = prompt + [int(token) for token in out.replace(",", " ").split()]
    assert len(said) > len(prompt)
    (logits,) = transformers_logits(tmp_path / "weights", [torch.tensor(said)])
    limit = {"fp32": 1e-5, "bf16": 0.1}[precision] * float(logits.abs().max())
    for at in range(len(prompt), len(said)):
        assert logits[at - 1].max() - logits[at - 1, said[at]] < limit


@pytest.mark.slow
def test_fp8_that_moec_makes(tmp_path: Path) -> None:
    """The default precision; the whole model is near the reference in the same FP8."""
    write_random_checkpoint(CASES["qwen3"], tmp_path / "weights", seed=5)
    art = moec.export(tmp_path / "weights", target="torch", out=tmp_path / "art")
    manifest = art.manifest
    assert (manifest.precision, manifest.compute, manifest.dialect) == ("fp8", "bf16", PLAIN)
    assert not manifest.buffered and art.stored()["layers.1.moe.down"].dtype == "fp8"
    ids = torch.arange(3, 40)[None]
    found, expected = (
        moec.open_session(art.path, engine=engine).logits(ids)[0] for engine in ("torch", "eager")
    )
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < FP8_NOISE.error


def test_a_proof_knows_values_behind_those_that_it_gives(tmp_path: Path) -> None:
    """It gives each expert its inputs. Blocks of 128 are too wide here, so that none are joined."""
    write_random_checkpoint(CASES["deepseek-v3"], tmp_path / "w", seed=3)
    art = moec.export(tmp_path / "w", "torch", "fp8", tmp_path / "art", scheme="deepseek")
    report = moec.validate(art.path)
    assert report.passed, report.first_divergence
    assert any("each expert" in note for note in report.notes)


def test_block_fp8_stays_in_place(tmp_path: Path) -> None:
    """DeepSeek-V3's own bytes and scales; no byte is written anew."""
    plain = CASES["deepseek-v3"]
    scheme = read_scheme(BLOCKS, tmp_path / "config.json", plain)
    spec = plain.model_copy(update={"scheme": scheme})
    write_random_checkpoint(spec, tmp_path / "weights", seed=4)
    art = moec.export(tmp_path / "weights", target="torch", out=tmp_path / "art")
    assert art.manifest.weights.mode == "in-place" and art.manifest.build.bytes_packed == 0
    targets = {node.target for node in part_graph(spec, "bf16", dialect=PLAIN).graph.nodes}
    assert ops.routed_layer.target in targets  # the kernels of blocks run it on a GPU
    ids = torch.arange(3, 40)[None]
    found, expected = (
        moec.open_session(art.path, engine=engine).logits(ids)[0] for engine in ("torch", "eager")
    )
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < FP8_NOISE.error


@pytest.mark.slow
def test_binding_later_is_building_with_weights(tmp_path: Path) -> None:
    write_random_checkpoint(CASES["aria"], tmp_path / "weights", seed=5)
    spec = moec.load_spec(tmp_path / "weights")
    moec.export(spec, target="torch", precision="fp32", out=tmp_path / "later")
    later = moec.bind(tmp_path / "later", tmp_path / "weights").path
    at_once = moec.export(tmp_path / "weights", "torch", "fp32", tmp_path / "once").path
    for name in ("model.pt2", "weights.safetensors"):
        assert (later / name).read_bytes() == (at_once / name).read_bytes()


def test_a_dialect_that_nobody_wrote_is_refused(tmp_path: Path, cli: Cli) -> None:
    write_random_checkpoint(CASES["olmoe"], tmp_path / "weights", seed=5)
    art = moec.export(tmp_path / "weights", "torch", "bf16", tmp_path / "art").path
    manifest = json.loads((art / "manifest.json").read_text())
    (art / "manifest.json").write_text(json.dumps(manifest | {"dialect": "torch-other"}))
    code, err = cli("generate", art, "--ids", "1")
    assert code == 2 and "dialect torch-other" in err and "Traceback" not in err
