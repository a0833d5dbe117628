"""Images in sessions: batches, pieces, generation, and what is refused before anything runs."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

import moec
from moec.artefact.artefact import open_artefact
from moec.runtime.batching import PREFILL_CHUNK
from moec.runtime.cache import new_cache
from moec.runtime.session import TILES, Session
from moec.spec.errors import MoecError
from tests.conftest import ROOT

IMAGE, TOKENS = 4, 4  # of the fixture: the image token's id, and tokens to a tile


@pytest.fixture(scope="module", params=["onnxruntime", "eager"])
def session(request: pytest.FixtureRequest, tiny_onnx: Path) -> Session:
    return moec.open_session(tiny_onnx, engine=request.param)


def _tiles(count: int) -> Tensor:
    return torch.rand(count, 3, 56, 56) * 2 - 1


def _row(*parts: int) -> list[int]:
    """Random words; a negative part is that many tiles."""
    row: list[int] = []
    for part in parts:
        words = torch.randint(6, 4096, (max(part, 0),)).tolist()
        row += words if part > 0 else [IMAGE] * (TOKENS * -part)
    return row


def test_rows_with_images_equal_each_row_alone(session: Session) -> None:
    rows = [_row(5, -2, 30), _row(9), _row(120, -1, 20, -1), _row(-1)]
    tiles = [_tiles(2), _tiles(0), _tiles(2), _tiles(1)]
    pixels = torch.cat(tiles)
    together = session.logits(rows, pixels)
    last, _ = session.prefill(rows, pixels)
    for index, (row, own) in enumerate(zip(rows, tiles, strict=True)):
        alone = session.logits([row], own if len(own) else None)[0]
        assert np.allclose(together[index, : len(row)], alone, atol=2e-4)
        assert np.allclose(last[index], alone[-1], atol=2e-4)


@pytest.mark.full
def test_images_that_a_long_prompts_pieces_cut_apart(session: Session) -> None:
    rows = [_row(PREFILL_CHUNK - 6, -3, 20, -1, 5), _row(PREFILL_CHUNK - 2, -1)]
    pixels = _tiles(5)
    whole = session.logits(rows, pixels)
    last, _ = session.prefill(rows, pixels)
    for index, row in enumerate(rows):
        # in norm: among so many tokens the pieces' rounding may tip a router's tie now and then
        expected = whole[index, len(row) - 1]
        assert np.linalg.norm(last[index] - expected) < 5e-3 * np.linalg.norm(expected)


def test_many_tiles_go_through_the_tower_in_turns(session: Session) -> None:
    pixels = _tiles(2 * TILES + 1)
    features = session.image_features(pixels)
    assert features.shape == (len(pixels) * TOKENS, 128)
    single = torch.cat([session.image_features(tile[None]) for tile in pixels])
    assert torch.allclose(features, single, atol=1e-6)


def test_generation_sees_the_image(tiny_onnx: Path, session: Session) -> None:
    ids, pixels = torch.tensor([_row(6, -1, 5)]), _tiles(1)
    tokens = session.generate(ids, pixels, max_new_tokens=12, stop=())
    logits = session.logits(tokens, pixels)[0, ids.shape[1] - 1 : -1]
    assert torch.equal(logits.argmax(-1), tokens[0, ids.shape[1] :])
    reference = moec.open_session(tiny_onnx, engine="eager")
    assert torch.equal(reference.generate(ids, pixels, max_new_tokens=12, stop=()), tokens)


def test_an_image_token_that_the_model_emits_is_a_token_like_others(session: Session) -> None:
    ids, pixels = torch.tensor([_row(6, -1, 5)]), _tiles(1)
    whole = torch.cat([ids, torch.tensor([[IMAGE, 9]])], 1)
    _, cache = session.prefill(ids, pixels)
    session.decode(torch.tensor([IMAGE]), cache)
    found = session.decode(torch.tensor([9]), cache)
    plain = session.prefill(whole)[0]
    assert not torch.allclose(found, plain, atol=1e-2)  # the image is still in the caches
    assert torch.isfinite(session.logits(whole)).all()  # without pixels, all are tokens


def test_half_precision_takes_float32_pixels(tiny: Path, tmp_path: Path) -> None:
    artefact = moec.export(tiny, precision="fp16", out=tmp_path / "a")
    half, full = moec.open_session(artefact.path), moec.open_session(tiny)
    pixels, ids = _tiles(1), [_row(4, -1, 8)]
    found, expected = half.image_features(pixels), full.image_features(pixels)
    assert found.dtype == torch.float16
    assert torch.linalg.norm(found - expected) < 3e-3 * torch.linalg.norm(expected)
    assert half.logits(ids, pixels).shape == (1, 16, 4096)


@pytest.mark.parametrize(
    "pixels, found",
    [
        (_tiles(1), "8 image tokens (id 4) for 1 tiles"),
        (_tiles(3), "8 image tokens (id 4) for 3 tiles"),
        (_tiles(0), "[0, 3, 56, 56]"),
        (torch.zeros(2, 3, 56, 28), "[2, 3, 56, 28]"),
        (torch.zeros(2, 1, 56, 56), "[2, 1, 56, 56]"),
        (torch.zeros(3, 56, 56), "[3, 56, 56]"),
        (torch.zeros(2, 3, 56, 56, dtype=torch.uint8), "torch.uint8"),
        (torch.full((2, 3, 56, 56), torch.nan), "not finite"),
        (np.full((2, 3, 56, 56), np.inf), "not finite"),
        (np.full((2, 3, 56, 56), 1e300), "not finite"),
        (torch.zeros(2, 3, 56, 56).to_sparse(), "torch.float32"),
        (np.array([[object()]]), "object"),
        (12, "int 12"),
        ([1.0, 2.0], "list"),
        ("photo.png", "photo.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("method", ["logits", "prefill", "generate"])
def test_pixels_that_do_not_fit_are_refused(
    session: Session, method: str, pixels: Any, found: str
) -> None:
    with pytest.raises(MoecError) as caught:
        getattr(session, method)([_row(3, -1, 2, -1)], pixels)
    assert found in str(caught.value) and caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 4


def test_an_image_across_two_rows_is_refused(session: Session) -> None:
    with pytest.raises(MoecError, match=r"by row \[3, 5\]"):
        session.logits([[IMAGE] * 3, [IMAGE] * 5], _tiles(2))


@pytest.mark.parametrize("shape", [(0, 128), (3, 128), (8, 128), (4, 127), (4,)], ids=str)
def test_features_that_do_not_fit_a_piece_are_refused(
    session: Session, shape: tuple[int, ...]
) -> None:
    ids = torch.tensor([_row(2, -1)])
    with pytest.raises(MoecError, match="one for each image token"):
        session.extend(
            ids, torch.tensor([6]), new_cache(session.spec, "fp32", 1, 8), torch.zeros(shape)
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(">f4"),
        lambda x: x.numpy()[:, :, ::-1][:, :, ::-1],
        lambda x: np.asfortranarray(x.numpy()),
        lambda x: x.double(),
        lambda x: x.clone().requires_grad_(),
        lambda x: x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
    ],
)
def test_pixels_come_in_any_memory_layout(session: Session, change: Any) -> None:
    pixels, ids = _tiles(1), [_row(3, -1, 2)]
    expected = session.logits(ids, pixels)
    assert np.array_equal(session.logits(ids, change(pixels)), expected)


def test_the_graph_itself_refuses_another_number_of_features(tiny_onnx: Path) -> None:
    """Whoever runs model.onnx without a session gets an error too, not a wrong number."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    folder = open_artefact(tiny_onnx).weights_folder
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    run = onnxruntime.InferenceSession(tiny_onnx / "model.onnx", options)
    feeds = {
        "input_ids": np.array([[7, 4, 4, 4, 4]]),
        "past_lengths": np.array([0]),
        "lengths": np.array([5]),
        "logit_index": np.array([[4]]),
    }
    feeds |= {
        port.name: np.zeros((1, 0, port.shape[2]), np.float32)
        for port in run.get_inputs()
        if port.name.startswith("past.")
    }
    assert [port.name for port in run.get_overridable_initializers()] == ["image_features"]
    plain = run.run(["logits"], feeds)[0]
    fused = run.run(["logits"], {**feeds, "image_features": np.ones((4, 128), np.float32)})[0]
    assert not np.allclose(plain, fused)
    for rows in (1, 3, 5):
        with pytest.raises(Exception, match="ScatterND"):
            run.run(["logits"], {**feeds, "image_features": np.ones((rows, 128), np.float32)})


@pytest.mark.full
@pytest.mark.parametrize("engine", [None, "eager"])
@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_a_session_outlives_a_change_of_the_working_directory(
    target: str, engine: str | None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tower's weights are read when the first image comes."""
    monkeypatch.chdir(tmp_path)
    moec.export(tiny, target=target, out="art", weights="copy")
    (tmp_path / "elsewhere").mkdir()
    sessions = [moec.open_session("art", engine=engine)]
    if engine:
        shutil.copytree(tiny, "checkpoint")
        sessions.append(moec.open_session("checkpoint"))
    prompt = moec.encode("art", "x", [ROOT / "examples" / "astronaut.jpg"])
    monkeypatch.chdir("elsewhere")
    for session in sessions:
        assert np.isfinite(session.logits([prompt.input_ids], prompt.pixel_values)).all()
