"""The trained checkpoint in every precision of target ort on a CPU."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import moec
from moec.runtime.engines.ort import QUANTIZED_FROM
from moec.runtime.session import Session
from moec.spec.errors import MoecError
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.proofs import assert_passed

pytestmark = pytest.mark.full

PERPLEXITY = 13.3217
quantized = pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < QUANTIZED_FROM,
    reason="onnxruntime is too old for quantised experts",
)
#: precision, placement -> largest relative change of perplexity, smallest share of equal choices
LIMITS = {
    ("fp16", None): (0.005, 0.99),
    ("fp16", "pack"): (0.005, 0.99),
    ("int8", None): (0.01, 0.97),
    ("int4", None): (0.06, 0.85),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            each,
            marks=[
                *([quantized] if each[0].startswith("int") else []),
                *([pytest.mark.slow] if each != ("int4", None) else []),
            ],
        )
        for each in LIMITS
    ],
    ids=lambda each: " ".join(filter(None, each)),
)
def case(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[float, float]]:
    precision, weights = request.param
    out = tmp_path_factory.mktemp("ort") / precision
    art = moec.export(tiny, target="ort", precision=precision, weights=weights, out=out)
    return art.path, LIMITS[request.param]


def test_perplexity_choices_and_generation(
    case: tuple[Path, tuple[float, float]], golden: dict[str, Tensor]
) -> None:
    path, (perplexity, agreement) = case
    session = moec.open_session(path)
    windows = golden["eval_ids"]
    logits = session.logits(windows[:, :-1]).transpose(1, 2)
    found = functional.cross_entropy(logits, windows[:, 1:]).exp().item()
    assert abs(found / PERPLEXITY - 1) < perplexity
    choices = session.logits(golden["input_ids"]).argmax(-1)
    assert (choices == golden["argmax"]).float().mean() >= agreement
    prompt = golden["generate.2"][:9]
    tokens = session.generate(prompt[None], max_new_tokens=6)
    assert tokens[0, :9].tolist() == prompt.tolist() and tokens.shape[1] > 9


@pytest.mark.slow  # CI proves int4 of ort on a small model: test_mixed_dtypes
def test_the_proof_passes(case: tuple[Path, tuple[float, float]]) -> None:
    assert_passed(moec.validate(case[0]))


@quantized
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weightless_builds_are_proven_on_a_twin(precision: str, tmp_path: Path) -> None:
    spec = moec.load_spec("scout")
    text = spec.text.model_copy(update={"layers": 4})
    art = moec.export(
        spec.model_copy(update={"text": text}),
        target="ort",
        precision=precision,
        out=tmp_path / "a",
    )
    report = moec.validate(art.path)
    assert_passed(report)
    assert report.twin


@pytest.mark.slow
@quantized
def test_a_tied_head_is_the_embedding_in_reference_and_engine(tmp_path: Path) -> None:
    spec = reduced(PRESETS["scout"], 4, block=64)
    text = spec.text.model_copy(update={"tie_embeddings": True})
    write_random_checkpoint(spec.model_copy(update={"text": text}), tmp_path / "weights")
    for weights, precision in (("pack", "fp32"), (None, "int8")):
        out = tmp_path / precision
        moec.export(
            tmp_path / "weights", target="ort", precision=precision, weights=weights, out=out
        )
        assert_passed(moec.validate(out))


@quantized
@pytest.mark.slow
def test_packed_artefacts_stand_alone(tiny: Path, tmp_path: Path) -> None:
    """Proven after the checkpoint is gone; the reference reads the packed weights."""
    import shutil

    checkpoint = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    art = moec.export(checkpoint, target="ort", precision="int4", out=tmp_path / "art")
    shutil.rmtree(checkpoint)
    (tmp_path / "art").rename(tmp_path / "moved")
    assert_passed(moec.validate(tmp_path / "moved", tokens=20))
    assert (
        art.manifest.build.bytes_packed
        == (tmp_path / "moved/genai/weights.safetensors").stat().st_size
    )
    changed = art.manifest.rewritten
    assert "embed.weight" not in changed and "layers.0.moe.router.weight" in changed
    assert changed["layers.0.moe.gate_up"].reason == "gate and up interleaved, int4 in blocks of 64"
    assert changed["layers.0.attn.q.weight"].bits == 8 and changed["layers.0.moe.down"].bits == 4


@pytest.mark.slow
@quantized
def test_damaged_quantised_weights_fail_the_proof(tiny: Path, tmp_path: Path) -> None:
    """A scale that is no number: the reference reads it too, and the proof names the weight."""
    art = moec.export(tiny, target="ort", precision="int8", out=tmp_path / "art")
    session: Session = moec.open_session(art.path)
    before = session.logits([[1, 2, 3]])
    ref = art.manifest.weights.tensors["layers.2.moe.shared.up.weight.scales"]
    with (art.path / ref.file).open("r+b") as file:
        file.seek(ref.offset)
        file.write(b"\xff" * 4)  # a NaN
    report = moec.validate(art.path, tokens=12)
    assert not report.passed
    assert report.first_divergence == "weights, layers.2: moe.shared.up.weight"
    assert "layers.2: moe.shared.up" in {check.name for check in report.checks if not check.passed}
    assert torch.as_tensor(before).isfinite().all()


def test_a_runtime_that_is_too_old_is_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    art = moec.export(tiny, target="ort", precision="int8", out=tmp_path / "art")
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    with pytest.raises(MoecError, match=r"1\.32 or newer") as caught:
        moec.open_session(art.path)
    assert caught.value.exit_code == 3
