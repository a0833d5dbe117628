"""The trained checkpoint against values that transformers computed for it."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

import moec
from moec.artefact.artefact import open_artefact
from moec.runtime.cache import new_cache
from moec.runtime.engines.eager import eager_engine
from moec.runtime.engines.ort import ort_engine
from moec.runtime.session import Session

ENGINES = ("onnxruntime", "eager")
PROMPTS = (
    'def main(argv=None):\n    """',
    "import os\nimport sys\n\nclass ",
    "    for name in sorted(",
    "# Copyright",
)
LOGITS_LIMIT = 2e-4  # absolute, on logits of about 10


@pytest.fixture(scope="module", params=["onnx", "ort", "ort, packed", "eager"])
def session(
    request: pytest.FixtureRequest,
    tiny: Path,
    tiny_onnx: Path,
    tiny_ort: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Session:
    if request.param == "ort, packed":
        out = tmp_path_factory.mktemp("packed") / "tiny"
        return moec.open_session(moec.export(tiny, target="ort", weights="pack", out=out).path)
    engine = "eager" if request.param == "eager" else "onnxruntime"
    return moec.open_session(tiny_ort if request.param == "ort" else tiny_onnx, engine=engine)


def test_logits_and_argmax_are_those_of_transformers(
    session: Session, golden: dict[str, Tensor]
) -> None:
    logits = session.logits(golden["input_ids"])
    assert logits.dtype == torch.float32 and logits.shape == (2, 300, 4096)
    assert (logits[:, -48:] - golden["logits"]).abs().max() < LOGITS_LIMIT
    assert torch.equal(logits.argmax(-1), golden["argmax"])


def test_image_features_and_logits_of_a_prompt_with_two_images(
    session: Session, golden: dict[str, Tensor]
) -> None:
    features = session.image_features(golden["pixel_values"])
    expected = golden["image_features"].flatten(0, 1)
    assert (features - expected).abs().max() < LOGITS_LIMIT
    logits = session.logits(golden["mm_input_ids"], golden["pixel_values"])
    assert (logits - golden["mm_logits"]).abs().max() < LOGITS_LIMIT
    plain = session.logits(golden["mm_input_ids"])
    assert (plain - golden["mm_logits"]).abs().max() > 1  # the images do matter


@pytest.mark.parametrize("engine", ENGINES)
def test_the_vision_tower_before_its_projector(
    engine: str, golden: dict[str, Tensor], tiny_onnx: Path
) -> None:
    artefact = open_artefact(tiny_onnx)
    taps = ["vision.adapter.fc2.act"]
    run = (
        ort_engine(artefact, taps=taps, part="vision")
        if engine == "onnxruntime"
        else eager_engine(artefact.manifest.spec, artefact.entries(), taps=taps, part="vision")
    )
    found = run({"pixel_values": golden["pixel_values"]})[taps[0]]
    assert (found - golden["vision_features"].flatten(0, 1)).abs().max() < LOGITS_LIMIT


@pytest.mark.full
@pytest.mark.parametrize(
    "index", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(PROMPTS)))]
)
def test_greedy_continuations_are_reproduced_through_the_caches(
    session: Session, golden: dict[str, Tensor], tiny: Path, index: int
) -> None:
    expected = golden[f"generate.{index}"]
    prompt = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(PROMPTS[index]).ids
    assert prompt == expected[: len(prompt)].tolist()
    got = session.generate(torch.tensor([prompt]), max_new_tokens=len(expected) - len(prompt))
    assert torch.equal(got[0], expected)


@pytest.mark.full
def test_all_continuations_in_one_ragged_batch(
    session: Session, golden: dict[str, Tensor], tiny: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    rows = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    got = session.generate(rows, max_new_tokens=150)
    for index, (row, prompt) in enumerate(zip(got, rows, strict=True)):
        expected = golden[f"generate.{index}"][: len(prompt) + 150]
        assert row[: len(expected)].tolist() == expected.tolist()


@pytest.mark.full
def test_perplexity_of_held_out_windows(session: Session, golden: dict[str, Tensor]) -> None:
    windows = golden["eval_ids"]
    logits = session.logits(windows[:, :-1])
    losses = functional.cross_entropy(
        logits.transpose(1, 2), windows[:, 1:], reduction="none"
    ).mean(1)
    assert torch.allclose(losses, golden["eval_nll"], atol=1e-4)
    assert abs(losses.mean().exp().item() - 13.32) < 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_every_layer_and_router_choice(
    engine: str, golden: dict[str, Tensor], tiny_onnx: Path
) -> None:
    artefact = open_artefact(tiny_onnx)
    spec = artefact.manifest.spec
    ids = golden["input_ids"]
    routers = [f"layers.{i}.moe.route.1" for i in range(8)]
    hidden = ["embed", *(f"layers.{i}.out" for i in range(8))]
    taps = [*hidden, *routers]
    run = (
        ort_engine(artefact, taps=taps)
        if engine == "onnxruntime"
        else eager_engine(spec, artefact.entries(), taps=taps)
    )
    out = run(
        {
            "input_ids": ids,
            "past_lengths": torch.zeros(2, dtype=torch.int64),
            "lengths": torch.tensor([300, 300]),
            "logit_index": torch.arange(300).repeat(2, 1),
            **new_cache(spec, "fp32", 2, 0).tensors,
        }
    )
    # hidden.08 is after the final norm; the layers before are plain outputs.
    for index, name in enumerate(hidden[:-1]):
        assert torch.allclose(out[name][:300], golden[f"hidden.{index:02}"][0], atol=1e-4)
    for index, name in enumerate(routers):
        assert torch.equal(out[name].reshape(2, 300), golden[f"router_top1.{index:02}"])


@pytest.mark.full
@pytest.mark.parametrize("precision, limit", [("fp16", 0.005)])
def test_half_precision_keeps_the_perplexity(
    tiny: Path, golden: dict[str, Tensor], tmp_path: Path, precision: str, limit: float
) -> None:
    moec.export(tiny, precision=precision, out=tmp_path / "a")
    windows = golden["eval_ids"]
    logits = moec.open_session(tmp_path / "a").logits(windows[:, :-1])
    perplexity = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp()
    assert abs(perplexity / 13.3217 - 1) < limit
