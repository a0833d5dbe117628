"""The command line as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

import moec
from moec.runtime.bench.bench import PEERS
from tests.conftest import ROOT, TINY, run_command
from tests.proofs import assert_passed

pytestmark = pytest.mark.full


def _process(*args: object, code: int = 0) -> str:
    """What the command prints, in a process of its own as a user has it."""
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", *map(str, args)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def _cli(*args: object, code: int = 0) -> str:
    """What the command prints, without waiting for a process to start."""
    ended, out, err = run_command(*args)
    assert ended == code, out + err
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("cli") / "tiny"
    return out, _process("build", "--checkpoint", TINY, "--out", out)


def test_build_proves_and_accounts(built: tuple[Path, str]) -> None:
    out, printed = built
    assert "PASSED" in printed and "0 B of weights copied" in printed
    for word in ("model.onnx", "peak memory", "layers.7 router", "prefill against decode"):
        assert word in printed
    manifest = json.loads((out / "manifest.json").read_text())
    assert_passed(manifest["parity"])
    assert manifest["weights"]["mode"] == "in-place"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_build_variant_needs_no_checkpoint(name: str, tmp_path: Path) -> None:
    printed = _cli("build", "--variant", name, "--out", tmp_path / "a")
    assert "PASSED" in printed and "twin" in printed and "no weights yet" in printed


def test_generate_streams_the_golden_text(built: tuple[Path, str]) -> None:
    prompt = "import os\nimport sys\n\nclass "
    text = _process("generate", built[0], "--prompt", prompt, "--max-new-tokens", 20)
    assert text.startswith(prompt) and len(text) > len(prompt) + 20
    eager = _cli(
        "generate", built[0], "--prompt", prompt, "--max-new-tokens", 20, "--engine", "eager"
    )
    assert eager == text


def test_generate_takes_photographs(built: tuple[Path, str]) -> None:
    photo = ROOT / "examples" / "astronaut.jpg"
    prompt = "def <|image|> main(<|image|>):"
    arguments = ["--image", photo, "--image", photo, "--prompt", prompt, "--max-new-tokens", 6]
    text = _cli("generate", built[0], *arguments)
    assert text.startswith(prompt) and len(text) > len(prompt) + 6
    session = moec.open_session(built[0])
    composed = moec.encode(built[0], prompt, [photo, photo])
    tokens = session.generate(composed.input_ids, composed.pixel_values, max_new_tokens=6)
    blind = session.generate(composed.input_ids, max_new_tokens=6)
    assert not np.array_equal(tokens, blind), "the fixture answers alike with and without images"
    new = tokens[0, len(composed.input_ids) :].tolist()
    assert text.rstrip("\n") == prompt + Tokenizer.from_file(str(TINY / "tokenizer.json")).decode(
        new
    )


def test_generate_from_ids(built: tuple[Path, str]) -> None:
    printed = _cli("generate", built[0], "--ids", "10,11,12", "--max-new-tokens", 3)
    assert len(printed.split()) == 3


def test_validate_writes_json_and_html(built: tuple[Path, str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    report = json.loads(
        _cli("validate", built[0], "--tokens", 140, "--seed", 3, "--json", "--html", page)
    )
    assert_passed(report)
    assert report["seed"] == 3
    assert "<table>" in page.read_text()


def test_inspect_and_verify(built: tuple[Path, str], tmp_path: Path) -> None:
    assert "verified" in _cli("inspect", built[0], "--verify")
    assert json.loads(_cli("inspect", built[0], "--json"))["target"] == "onnx"


def test_inspect_notices_a_changed_byte(tmp_path: Path) -> None:
    out = tmp_path / "a"
    _cli("build", "--variant", "tiny-scout", "--no-validate", "--out", out)
    raw = bytearray((out / "model.onnx").read_bytes())
    raw[len(raw) // 2] ^= 1
    (out / "model.onnx").write_bytes(raw)
    _cli("inspect", out, "--verify", code=1)


def test_bind(tmp_path: Path) -> None:
    out = tmp_path / "a"
    _cli("build", "--variant", "tiny-scout", "--no-validate", "--out", out)
    assert "left in" in _cli("bind", out, "--checkpoint", TINY)
    assert "PASSED" in _cli("validate", out, "--tokens", 20)


def test_spec_commands(tmp_path: Path) -> None:
    assert "HYPOTHETICAL" in _cli("spec", "list")
    shown = _cli("spec", "show", "maverick")
    assert yaml.safe_load(shown)["text"]["ffn"] == "DM"
    assert json.loads(_cli("spec", "show", "scout", "--format", "config"))["model_type"] == "llama4"
    assert "ModelSpec" in json.loads(_cli("spec", "schema"))["title"]
    assert "text.ffn" in _cli("spec", "diff", "scout", "maverick", code=1)
    assert "no difference" in _cli("spec", "diff", "tiny-scout", TINY)
    (tmp_path / "mine.yaml").write_text(shown)
    assert "no difference" in _cli("spec", "diff", tmp_path / "mine.yaml", "maverick")


@pytest.mark.slow
def test_build_for_onnxruntime_in_four_bits(tmp_path: Path) -> None:
    out = tmp_path / "small"
    printed = _cli(
        "build", "--checkpoint", TINY, "--target", "ort", "--precision", "int4", "--out", out
    )
    assert (
        "PASSED" in printed and "weights.safetensors" in printed and "int8 activations" in printed
    )
    _cli("inspect", out, "--verify")
    _cli("validate", out, "--device", "abacus", code=2)
    assert "main" in _cli("generate", out, "--prompt", "def main(", "--max-new-tokens", 4)


def test_plan() -> None:
    plan = json.loads(_cli("plan", "scout", "--precision", "fp8", "--device", "h200", "--json"))
    assert plan["fits"] is True
    assert "decode step" in _cli("plan", "maverick")
    printed = _cli("plan", "maverick", "--precision", "fp8", "--device", "h200", "--gpus", 2)
    assert "each of 2 GPUs" in printed and "no: needs 4 GPUs" in printed and "98" in printed
    assert (
        json.loads(_cli("plan", "scout", "--precision", "int4", "--json"))["weights_bytes"] < 7e10
    )


@pytest.mark.slow
@pytest.mark.parametrize("peers", [1, 2])
def test_bench(built: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, peers: int) -> None:
    names = ("transformers", "transformers, compiled")[:peers]  # a minute to compile
    monkeypatch.setattr("moec.runtime.bench.bench.PEERS", PEERS[:peers])
    rows = json.loads(_cli("bench", built[0], "--new-tokens", 3, "--rounds", 1, "--json"))
    lanes = [(row["engine"], row["preset"]) for row in rows]
    ours = [("onnxruntime", "lean"), ("onnxruntime", "fast"), ("eager", "")]
    assert lanes == [*ours, *((name, "") for name in names)]
    for row in rows:
        assert not row["error"] and row["decode_tokens_per_s"] > 0 and row["peak_bytes"] > 1e7
        assert 0 < row["bandwidth_share"] < 1


def test_usage_errors_exit_with_2() -> None:
    _process("build", "--variant", "scout", "--surprise", code=2)
    _cli("validate", code=2)
