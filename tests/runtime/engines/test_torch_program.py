"""Target torch on the CPU: rows, chunk borders, images, taps; and what is refused."""

import gc
import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moec
from moec.artefact.artefact import open_artefact
from moec.exporters.torch.program import part_graph
from moec.runtime.engines.synthetic import synthetic
from moec.runtime.engines.torch_program import shown, torch_engine, torch_with
from moec.runtime.engines.weights import load
from moec.runtime.open import artefact_session
from moec.runtime.proof.compare import FP8_NOISE
from moec.runtime.session import Session
from moec.spec import names
from moec.spec.errors import MoecError
from moec.spec.hf.forms import SINGLE
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.joined import joined_tensors
from moec.weights.random import write_random_checkpoint
from moec.weights.view import STORED

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def art(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("torch") / "art"
    return moec.export(tiny, target="torch", out=out).path


@pytest.fixture
def damaged(art: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(art, tmp_path / "art"))


def _near(found: Tensor, expected: Tensor) -> bool:
    """As near as FP8 itself is: bf16 in another batch flips roundings, and routers on near ties."""
    return bool((found - expected).norm() < FP8_NOISE.error * expected.norm())


def test_rows_of_different_lengths_are_the_rows_alone(art: Path, golden: dict[str, Tensor]) -> None:
    session, ids = moec.open_session(art), golden["input_ids"]
    rows = [ids[0, :150].tolist(), ids[1, :1].tolist(), ids[1, :131].tolist()]
    tokens = session.generate(rows, max_new_tokens=12, stop=())
    for i, row in enumerate(rows):
        alone = session.generate([row], max_new_tokens=12, stop=())[0]
        # One step of three rows rounds as one of one row does, or a choice was a near tie.
        got = tokens[i, : len(alone)]
        differ = (got != alone).nonzero()[0]
        if len(differ):
            logits = session.logits([alone[: differ[0]].tolist()])[0, -1]
            assert logits[alone[differ[0]]] - logits[got[differ[0]]] < 0.1 * abs(logits).max()


def test_decode_over_chunk_borders_is_prefill(art: Path, golden: dict[str, Tensor]) -> None:
    session, ids = moec.open_session(art), golden["input_ids"][:, :140]
    chunk = session.spec.text.chunk
    assert chunk and chunk < 135
    whole = session.logits(ids)
    logits, cache = session.prefill(ids[:, : chunk - 3])
    assert _near(logits, whole[:, chunk - 4])
    for at in range(chunk - 3, chunk + 4):  # the cache grows on the way
        assert _near(session.decode(ids[:, at], cache), whole[:, at])


def test_a_call_writes_the_caches_that_it_is_given(art: Path) -> None:
    session = moec.open_session(art)
    cache = session.new_cache(2, 8)
    before = dict(cache.tensors)
    session.extend(torch.tensor([[5], [6]]), torch.tensor([1, 1]), cache)
    for name, tensor in cache.tensors.items():
        assert tensor is before[name]
        assert tensor[:, :, 0].any() and not tensor[:, :, 1:].any()


def test_generation_that_runs_ahead_is_one_that_waits(
    art: Path, golden: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step starts before anyone knows whether a row has ended."""
    session = moec.open_session(art)
    ids, lengths = golden["input_ids"][:2, :40], torch.tensor([40, 9])

    def run(
        stop: tuple[int, ...], session: Session = session
    ) -> tuple[list[list[int]], list[list[int | None]]]:
        seen: list[list[int | None]] = []
        out = session.generate(
            ids, lengths=lengths, max_new_tokens=5, stop=stop, stream=seen.append
        )
        return out.tolist(), seen

    free = run(())
    stop = (int(free[1][2][1] or 0),)  # what the shorter row says third
    waited = run(stop)
    steps = []
    likeliest = Session.likeliest
    ahead = replace(session, queues=True)
    monkeypatch.setattr(Session, "likeliest", lambda *args: steps.append(1) or likeliest(*args))
    assert run((), ahead) == free and len(steps) == 4
    assert run(stop, ahead) == waited and any(None in step for step in waited[1])


def test_the_engine_keeps_no_caches(art: Path, golden: dict[str, Tensor]) -> None:
    """Beside weights that fill a GPU, those of the last call would be one cache too many."""
    session = moec.open_session(art)
    _, cache = session.prefill(golden["input_ids"][:1, :20])
    alive = [weakref.ref(each) for each in cache.tensors.values()]
    del cache
    gc.collect()
    assert not any(each() is not None for each in alive)


def test_images_go_through_the_tower(art: Path, golden: dict[str, Tensor]) -> None:
    session, eager = moec.open_session(art), moec.open_session(art, engine="eager")
    pixels = golden["pixel_values"]
    assert _near(session.image_features(pixels).float(), golden["image_features"].flatten(0, 1))
    found, expected = (s.logits(golden["mm_input_ids"], pixels) for s in (session, eager))
    assert _near(found, expected)


def test_taps_are_of_the_graph_that_was_written(art: Path, golden: dict[str, Tensor]) -> None:
    artefact, ids = open_artefact(art), golden["input_ids"][:1, :20]
    taps = ["layers.3.out", "layers.3.moe.router", "layers.3.moe.route.1"]
    lengths = torch.tensor([20])
    found = artefact_session(artefact, taps=taps).trace(ids, lengths, taps)
    assert found["layers.3.out"].shape == (20, artefact.manifest.spec.text.dim)
    assert torch.equal(found["layers.3.moe.router"].argmax(-1), found[taps[2]][:, 0])
    plain = artefact_session(artefact).trace(ids, lengths, [])
    assert torch.equal(found["logits"], plain["logits"])


def test_given_values_take_the_place_of_those_of_fused_ops(tmp_path: Path) -> None:
    update = {"layers": 3, "vocab": 64, "attention": "LLG", "rope": "RRN", "ffn": "DM"}
    small = reduced(PRESETS["tiny-scout"], 3).text.model_copy(update=update)
    spec = ModelSpec(name="small", provenance="custom", dtype="bf16", text=small)
    art, weights = moec.export(spec, "torch", out=tmp_path / "art"), synthetic(spec, 1, "cpu")
    nodes = part_graph(art.manifest.spec, "bf16").graph.nodes
    inner = {str(node.meta.get("name")) for node in nodes}
    taps = [name for name in shown(art, "model", sorted(inner)) if names.layer_of(name) is not None]
    session = artefact_session(art, taps=taps, engine=torch_with(weights))
    ids, lengths = torch.arange(10, 16)[None], torch.tensor([6])
    free = session.trace(ids, lengths, taps)
    run = torch_with(weights).gives(art, "model", "cpu", "lean", taps, taps)  # type: ignore[misc]
    for shift in (0, 1):
        given = {names.given(name): free[name].roll(shift, 1) for name in taps}
        seen = replace(session, run=lambda feeds, own=given: run({**feeds, **own}))
        found = seen.trace(ids, lengths, taps)
        same = {name for name in free if torch.equal(found[name], free[name])}
        assert same == (set(free) if shift == 0 else {names.attention(0, "o")})


def test_loaded_weights_are_the_stored_pieces(art: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = open_artefact(art)
    whole = load(artefact)
    fused = joined_tensors(artefact.manifest.spec)
    kinds = {name: (each.shape, STORED[each.dtype]) for name, each in fused.items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in whole.items()} == kinds
    monkeypatch.setattr("moec.runtime.engines.reading.BLOCK", 1000)
    for name, tensor in load(artefact).items():
        assert torch.equal(tensor.view(torch.uint8), whole[name].view(torch.uint8)), name
    # Experts as the reference reads them: [expert, in, out], the shared one apart.
    codes = artefact.entries()["layers.1.moe.down"].read()  # type: ignore[union-attr]
    joined = whole["layers.1.moe.down"]
    assert torch.equal(joined[:-1].transpose(1, 2).float(), codes.float())
    stored = artefact.stored()["layers.1.moe.shared.down.weight"]
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        expected = file.read(stored.nbytes)
    assert joined[-1].contiguous().view(torch.uint8).numpy().tobytes() == expected


def test_weights_may_be_given_where_there_are_none(tiny: Path, art: Path, tmp_path: Path) -> None:
    unbound = moec.export(moec.load_spec(tiny), target="torch", out=tmp_path / "unbound")
    weights = load(open_artefact(art))
    session = artefact_session(unbound, engine=torch_with(weights))
    ids = torch.arange(5, 25)[None]
    assert torch.equal(session.logits(ids), moec.open_session(art).logits(ids))
    with pytest.raises(MoecError, match="without weights"):
        torch_engine(unbound)


# ---------------------------------------------------------------- refusals


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(art: Path) -> None:
    with pytest.raises(MoecError, match="finds no GPU") as caught:
        moec.open_session(art, device="cuda")
    assert caught.value.exit_code == 3


def test_cuda_without_triton_is_refused(art: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("moec.runtime.engines.gpu.find_spec", lambda name: None)
    with pytest.raises(MoecError, match="triton") as caught:
        moec.open_session(art, device="cuda")
    assert caught.value.exit_code == 3


def test_sizes_that_the_kernels_do_not_take_are_refused_on_cuda_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="kernels need triton")
    write_random_checkpoint(reduced(PRESETS["tiny-scout"], 2), tmp_path / "narrow")
    art = moec.export(tmp_path / "narrow", target="torch", out=tmp_path / "art").path
    assert moec.open_session(art).logits([[5, 6]]).shape == (1, 2, 256)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *of: (9, 0))
    monkeypatch.setattr("moec.runtime.engines.torch_program.load", None)  # not so far
    with pytest.raises(MoecError, match=r"text\.head_dim 8") as caught:
        moec.open_session(art, device="cuda")
    assert caught.value.exit_code == 3 and "--device cpu" in caught.value.next_step


def test_engines_of_other_targets_are_refused(art: Path, tiny_onnx: Path) -> None:
    for path, engine in ((art, "onnxruntime"), (tiny_onnx, "torch")):
        with pytest.raises(MoecError, match=f"engine {engine}"):
            moec.open_session(path, engine=engine)


def test_a_broken_program_is_refused(damaged: Path) -> None:
    file = damaged / "model.pt2"
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(MoecError, match=r"model\.pt2") as caught:
        moec.open_session(damaged)
    assert caught.value.exit_code == 1


def test_weights_cut_short_are_refused(damaged: Path) -> None:
    file = damaged / SINGLE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(MoecError, match=r"model\.safetensors"):
        moec.open_session(damaged)


def test_weights_of_another_size_are_refused(damaged: Path) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["weights"]["tensors"]["norm.weight"]["length"] -= 2
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MoecError, match=r"norm\.weight"):
        moec.open_session(damaged)


def test_sessions_on_the_cpu_do_without_triton(art: Path) -> None:
    """torch itself imports it, where it is, to load a program."""
    code = (
        "import sys, moec, moec.cli\n"
        "from moec.runtime.engines import torch_program\n"
        "assert 'triton' not in sys.modules\n"
        "sys.modules['triton'] = None\n"  # as if it were not installed
        f"moec.open_session({str(art)!r}).logits([[5, 6]])\n"
        "assert not any(name.startswith('moec.kernels') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
