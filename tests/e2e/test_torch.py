"""The trained checkpoint through target torch: the command line, text, and what FP8 costs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import moec
from moec.artefact.artefact import open_artefact
from tests.proofs import assert_passed

pytestmark = pytest.mark.full

PERPLEXITY = 13.3217


@pytest.fixture(scope="module")
def art(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("torch") / "art"
    return moec.export(tiny, target="torch", out=out).path


@pytest.mark.slow
def test_the_command_line(
    tiny: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    art = tmp_path / "art"
    build = ("build", "--checkpoint", tiny, "--target", "torch", "--precision", "fp8")
    assert cli(*build, "--out", art) == (0, "")
    parity = open_artefact(art).manifest.parity
    assert_passed(parity)
    assert parity and parity["engine"] == "torch"
    assert cli("inspect", art, "--verify") == (0, "")
    assert cli("generate", art, "--prompt", "def main(", "--max-new-tokens", 4) == (0, "")
    code, said = cli("validate", art, "--device", "tpu")
    assert code == 2 and "device tpu" in said


@pytest.mark.slow
def test_greedy_text_is_the_eager_graphs(art: Path, golden: dict[str, Tensor]) -> None:
    prompts = golden["input_ids"][:, :40]
    found, expected = (
        moec.open_session(art, engine=engine).generate(prompts, max_new_tokens=60, stop=())
        for engine in ("torch", "eager")
    )
    assert torch.equal(found, expected)


def test_perplexity_is_the_eager_graphs(art: Path, golden: dict[str, Tensor]) -> None:
    ids = golden["eval_ids"][:6]
    found, expected = (
        _perplexity(moec.open_session(art, engine=engine).logits(ids), ids)
        for engine in ("torch", "eager")
    )
    assert abs(found / expected - 1) < 0.005
    wide = float(golden["eval_nll"][:6].mean().exp())
    assert abs(found / wide - 1) < 0.03


def _perplexity(logits: Tensor, ids: Tensor) -> float:
    flat = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    return float(functional.cross_entropy(*flat).exp())
