from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import moec
from moec.runtime.batching import PREFILL_CHUNK
from moec.runtime.sampling import sample
from moec.runtime.session import Session
from moec.spec.errors import MoecError


@pytest.fixture(autouse=True)
def same_tokens() -> None:
    """Two runs of an engine may part where a router's best experts are a rounding apart.

    No limit on an error holds for such tokens, so each test draws the same ones every time.
    """
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=["onnx", "ort"])
def session(request: pytest.FixtureRequest, tiny_onnx: Path, tiny_ort: Path) -> Session:
    return moec.open_session({"onnx": tiny_onnx, "ort": tiny_ort}[request.param])


def test_tensors_give_tensors_and_arrays_give_arrays(session: Session) -> None:
    ids = np.array([[5, 6, 7]], dtype=np.int32)
    array = session.logits(ids)
    tensor = session.logits(torch.from_numpy(ids))
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), array)
    assert np.array_equal(session.logits([5, 6, 7]), array)


def test_rows_of_different_length_equal_each_row_alone(session: Session) -> None:
    rows = [torch.randint(0, 4096, (n,)).tolist() for n in (1, 7, 130, 300)]
    together = session.logits(rows)
    last, cache = session.prefill(rows)
    assert cache.lengths.tolist() == [1, 7, 130, 300]
    for index, row in enumerate(rows):
        alone = session.logits([row])[0]
        assert np.allclose(together[index, : len(row)], alone, atol=1e-4)
        assert np.allclose(last[index], alone[-1], atol=1e-4)


@pytest.mark.full
def test_a_ragged_batch_decodes_past_three_borders_as_each_row_alone(session: Session) -> None:
    """Chunks of 128: rows of 1, 7, 130 and 400 tokens, and 390 more of each."""
    rows = [torch.randint(0, 4096, (n,)) for n in (1, 7, 130, 400)]
    steps = torch.randint(0, 4096, (4, 390))
    logits, cache = session.prefill([row.tolist() for row in rows])
    found = [logits] + [session.decode(column, cache) for column in steps.T]
    for index, row in enumerate(rows):
        whole = session.logits(torch.cat([row, steps[index]])[None])[0, len(row) - 1 :]
        assert torch.allclose(torch.stack(found)[:, index], whole, atol=2e-4)


def test_a_row_that_pauses_goes_on_where_it_was(session: Session) -> None:
    ids = torch.randint(0, 4096, (2, 131))
    whole = session.logits(ids)
    _, cache = session.prefill(ids[:, :126], capacity=126)
    for column in range(126, 131):  # row 0 alone, over a border
        session.extend(ids[:, column : column + 1], torch.tensor([1, 0]), cache)
    for column in range(126, 131):
        got = session.extend(ids[:, column : column + 1], torch.tensor([0, 1]), cache)
        assert torch.allclose(got[1], whole[1, column], atol=1e-4) and not got[0].any()
    assert cache.lengths.tolist() == [131, 131]


@pytest.mark.full
def test_decode_grows_the_caches_and_rings_stay_at_the_chunk(session: Session) -> None:
    ids = torch.randint(0, 4096, (1, 150))
    whole = session.logits(ids)
    logits, cache = session.prefill(ids[:, :3], capacity=4)
    for position in range(3, 150):
        logits = session.decode(ids[:, position], cache)
    assert torch.allclose(logits[0], whole[0, -1], atol=1e-4)
    slots = {"slots": 1, "buffers": 2}[session.limits.layout]
    assert cache.tensors["past.0.key"].shape[slots] == 128  # a chunk
    assert cache.tensors["past.3.key"].shape[slots] >= 150


def test_long_prompts_go_through_in_pieces(session: Session) -> None:
    ids = torch.randint(0, 4096, (1, PREFILL_CHUNK + 40))
    last, _ = session.prefill(ids)
    assert torch.allclose(last[0], session.logits(ids)[0, -1], atol=2e-4)


def test_stop_tokens_end_rows_one_by_one(session: Session, golden: dict[str, Tensor]) -> None:
    prompt = [golden["generate.1"][:11].tolist(), golden["generate.3"][:5].tolist()]
    free = session.generate(prompt, max_new_tokens=6, stop=())
    stop = int(free[0, 12])  # the second new token of row 0
    assert stop not in (free[0, 11], *free[1, 5:11])
    streamed: list[list[int | None]] = []
    got = session.generate(prompt, max_new_tokens=6, stop=[stop], stream=streamed.append)
    assert got.tolist() == free[:, :13].tolist()  # row 0 ends with the stop token
    assert set(got[1, 11:].tolist()) == {session.spec.tokens.pad}
    assert streamed[0] == [free[0, 11], free[1, 5]]
    assert all(step[0] is None for step in streamed[2:])


def test_sampling_is_reproducible_by_seed(session: Session) -> None:
    one = session.generate(
        [[9, 9]], max_new_tokens=12, temperature=1.5, top_k=50, top_p=0.9, seed=4
    )
    two = session.generate(
        [[9, 9]], max_new_tokens=12, temperature=1.5, top_k=50, top_p=0.9, seed=4
    )
    other = session.generate(
        [[9, 9]], max_new_tokens=12, temperature=1.5, top_k=50, top_p=0.9, seed=5
    )
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_sampling_filters_keep_what_they_say() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, 1.0, top_k=2, generator=generator).tolist()) == {0, 1}
    assert set(sample(logits, 1.0, top_p=0.6, generator=generator).tolist()) == {0, 1}
    assert set(sample(logits, 1.0, top_p=0.5, generator=generator).tolist()) == {0}
    share = (sample(logits, 1.0, generator=generator) == 0).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.05)
    assert sample(logits[:1], 0.0).tolist() == [0]


@pytest.mark.parametrize("preset", ["lean", "fast"])
def test_presets_of_session_options_give_the_same_numbers(tiny_onnx: Path, preset: str) -> None:
    ids = torch.randint(0, 4096, (2, 140))
    eager = moec.open_session(tiny_onnx, engine="eager").logits(ids)
    assert torch.allclose(
        moec.open_session(tiny_onnx, session_options=preset).logits(ids), eager, atol=2e-4
    )


def test_a_checkpoint_opens_in_eager(tiny: Path, session: Session) -> None:
    ids = torch.randint(0, 4096, (1, 20))
    assert torch.allclose(moec.open_session(tiny).logits(ids), session.logits(ids), atol=2e-4)


@pytest.mark.parametrize(
    "change, code", [({"device": "cuda"}, 3), ({"engine": "abacus"}, 2), ({"preset": "x"}, 2)]
)
def test_what_is_not_there_is_refused(tiny_onnx: Path, change: dict[str, str], code: int) -> None:
    with pytest.raises(MoecError) as caught:
        moec.open_session(tiny_onnx, **change)  # type: ignore[arg-type]
    assert caught.value.exit_code == code


def test_bf16_graphs_are_built_but_not_executable_on_the_cpu(tiny: Path, tmp_path: Path) -> None:
    artefact = moec.export(tiny, precision="bf16", out=tmp_path / "a")
    for attempt in (moec.open_session, moec.validate):
        with pytest.raises(MoecError) as caught:
            attempt(artefact.path)
        assert caught.value.exit_code == 3
    assert moec.open_session(artefact.path, engine="eager").logits([[1, 2]]).shape == (1, 2, 4096)


def test_a_prefills_logits_belong_to_the_caller(session: Session) -> None:
    for rows in ([[5, 6, 7]], [[5, 6, 7], [5, 6]]):
        logits, cache = session.prefill(rows)
        same = logits.clone()
        logits[:, 0] = float("-inf")  # as one does who bans a token
        session.decode(logits.argmax(-1), cache)
        assert torch.equal(logits[:, 1:], same[:, 1:])
