"""What engines compute, over the fake package: rows, pieces, chunk borders, images, caches."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moec
from moec.artefact.artefact import Artefact
from moec.artefact.engine_options import EngineOptions
from moec.exporters.onnx.weight_inputs import weights_of
from moec.runtime.open import artefact_session
from moec.runtime.session import Session
from moec.weights.random import write_random_checkpoint
from tests.e2e.test_golden import LOGITS_LIMIT
from tests.runtime.engines.tensorrt.conftest import SMALL, built, session_of
from tests.runtime.engines.tensorrt.fake import Package, plan_of

EXACT = 2e-4


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    out = tmp_path_factory.mktemp("trained") / "art"
    options = EngineOptions(context=264, piece=128, build=False)
    return moec.export(tiny, target="tensorrt-rtx", precision="fp32", out=out, options=options)


@pytest.fixture
def golden_session(trained: Artefact) -> Session:
    return session_of(trained, Package({p: plan_of(trained, p) for p in ("model", "vision")}))


def _row(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, SMALL.text.vocab, (length,), generator=generator).tolist()


@pytest.mark.full
def test_golden_logits_by_prefill_and_decode_over_a_border(
    golden_session: Session, golden: dict[str, Tensor]
) -> None:
    ids, expected = golden["input_ids"][:1], golden["logits"][0]  # of the last 48 of 300
    logits, cache = golden_session.prefill(ids[:, :253])
    assert (logits - expected[0]).abs().max() < LOGITS_LIMIT
    for at in range(253, 259):  # 256 begins a chunk
        logits = golden_session.decode(ids[:, at], cache)
        assert (logits - expected[at - 252]).abs().max() < LOGITS_LIMIT


def test_golden_images(golden_session: Session, golden: dict[str, Tensor]) -> None:
    pixels = golden["pixel_values"]
    found = golden_session.image_features(pixels)
    assert torch.allclose(found, golden["image_features"].flatten(0, 1), atol=EXACT)
    logits = golden_session.logits(golden["mm_input_ids"], pixels)
    assert (logits - golden["mm_logits"]).abs().max() < LOGITS_LIMIT


def test_rows_of_different_lengths_over_borders(session: Session, reference: Session) -> None:
    rows = [_row(19), _row(1, 1), _row(9, 2)]
    assert session.spec.text.chunk == 8
    found, expected = session.logits(rows), reference.logits(rows)
    for i, row in enumerate(rows):
        assert abs(found[i, : len(row)] - expected[i, : len(row)]).max() < EXACT


@pytest.mark.full
def test_decode_of_a_batch_is_prefill(
    session: Session, reference: Session, package: Package
) -> None:
    rows, steps = [_row(6), _row(1, 1), _row(15, 2)], torch.tensor([_row(11, 3)] * 3)
    logits, cache = session.prefill(rows)
    found = [logits, *(session.decode(steps[:, at], cache) for at in range(11))]
    for i, row in enumerate(rows):
        whole = reference.logits(torch.tensor([row + steps[i].tolist()]))[0]
        for at, step in enumerate(found):
            assert (step[i] - whole[len(row) - 1 + at]).abs().max() < EXACT
    calls = package.plans["model"].calls
    assert {shapes["input_ids"] for profile, shapes in calls if profile == 0} == {(1, 1), (3, 1)}
    widths = {shapes["input_ids"] for profile, shapes in calls if profile == 1}
    assert widths == {(1, 5), (1, 2), (1, 3)}, "a prompt in pieces, row by row, up to each border"


def test_generation(session: Session, reference: Session) -> None:
    rows = [_row(7), _row(3, 1)]
    found, expected = (each.generate(rows, max_new_tokens=6, stop=()) for each in
                       (session, reference))  # fmt: skip
    assert found.tolist() == expected.tolist()


def test_images_in_a_prompt(session: Session, reference: Session, package: Package) -> None:
    assert SMALL.vision
    pixels = torch.rand(2, 3, 56, 56) * 2 - 1
    image = [SMALL.tokens.image] * SMALL.vision.tokens
    row = [*_row(4), *image, *_row(3, 1), *image]  # cut by pieces and borders; it ends in an image
    found = session.prefill([row], pixels)[0]
    assert (found - reference.prefill([row], pixels)[0]).abs().max() < EXACT
    calls = package.plans["model"].calls
    given = [(profile, shapes["image_features"][0]) for profile, shapes in calls]
    assert (1, 1) in given, "an image token alone is no decode step"
    assert sum(count for _, count in given) == 2 * len(image)


@pytest.mark.parametrize("aliased", [True, False])
def test_a_call_writes_the_caches_that_it_is_given(
    art: Artefact, package: Package, aliased: bool
) -> None:
    """Where the engine writes over the cache, and where it does not say so."""
    if not aliased:
        for each in package.plans["model"].tensors.values():
            each.alias = None
    session = session_of(art, package)
    cache = session.new_cache(2, 8)
    before = dict(cache.tensors)
    session.extend(torch.tensor([[5], [6]]), torch.tensor([1, 1]), cache)
    for name, tensor in cache.tensors.items():
        assert tensor is before[name]
        assert tensor[:, :, 0].any() and not tensor[:, :, 1:].any()


def test_caches_where_tensorrt_takes_none_are_written_too(
    session: Session, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moec.runtime.engines.tensorrt.run.ALIGNED", 1 << 40)
    rows = [_row(6), _row(9, 1)]
    for found, expected in zip(session.prefill(rows)[0], reference.prefill(rows)[0], strict=True):
        assert (found - expected).abs().max() < EXACT


def test_inputs_become_what_the_engine_takes(session: Session) -> None:
    """Other dtypes, gaps, and inputs that it does not have."""
    rows = torch.tensor([[5, 7], [6, 8]])
    wide, narrow = session.new_cache(2, 8), session.new_cache(2, 8)
    last = torch.zeros(2, dtype=torch.int32)
    feeds = {"input_ids": rows[:, :1].contiguous(), "global.last": last, "ring.last": last}
    feeds |= {"past_lengths": last.long(), "logit_index": last.long()[:, None]}
    expected = session.run(feeds | wide.tensors)
    other = {name: each.int() for name, each in feeds.items()}
    other |= {"input_ids": rows.int()[:, :1], "global.last": last.long(), "ring.total": last}
    found = session.run(other | narrow.tensors)
    assert list(found) == ["logits"] and torch.equal(found["logits"], expected["logits"])


@pytest.mark.full
def test_the_engine_keeps_no_caches(session: Session) -> None:
    _, cache = session.prefill([_row(9)])
    alive = [weakref.ref(each) for each in cache.tensors.values()]
    del cache
    gc.collect()
    assert not any(each() is not None for each in alive)


@pytest.mark.full
def test_all_memory_is_somebodys(session: Session, package: Package) -> None:
    package.watch_memory = True
    pixels = torch.rand(1, 3, 56, 56)
    image = [SMALL.tokens.image] * (SMALL.vision.tokens if SMALL.vision else 0)
    session.generate([[*image, 7]], pixels, max_new_tokens=2)
    assert len(package.plans["model"].calls) >= 2


def test_bf16(tmp_path: Path) -> None:
    art = built(SMALL, tmp_path, "bf16")
    package = Package({part: plan_of(art, part) for part in ("model", "vision")})
    session, expected = session_of(art, package), artefact_session(art, engine="interpreter")
    logits, cache = session.prefill([_row(6)])
    assert {each.dtype for each in cache.tensors.values()} == {torch.bfloat16}
    whole = expected.logits([_row(6)])[0, -1]
    assert (logits[0] - torch.as_tensor(whole)).norm() < 0.03 * logits[0].norm()


@pytest.mark.parametrize("scheme", ["static", "mixed"])
def test_fp8_experts_are_bindings(scheme: str, tmp_path: Path) -> None:
    """Whole tensors of codes; for a plugin, several that are joined."""
    wide = {"hidden": 32, "shared_hidden": 32}  # the plugin has no kernels for less
    experts = SMALL.text.experts.model_copy(update=wide)
    text = SMALL.text.model_copy(update={"experts": experts})
    spec = SMALL.model_copy(update={"dtype": "bf16", "vision": None, "text": text})
    write_random_checkpoint(spec, tmp_path / "checkpoint")
    scales = moec.calibrate(tmp_path / "checkpoint", torch.tensor([_row(30)]))
    art = built(spec, tmp_path, "fp8", scheme=scheme, scales=scales)
    plan = plan_of(art)
    assert "FP8" in {plan.tensors[name].dtype for name in plan.weights}
    parts = weights_of(art.manifest, art.stored(), list(plan.weights))
    assert (max(map(len, parts.values())) > 1) == (scheme == "mixed")
    session, expected = (
        session_of(art, Package({"model": plan})),
        artefact_session(art, engine="interpreter"),
    )
    found, same = session.logits([_row(6)]), expected.logits([_row(6)])
    assert abs(found - same).max() < 0.05 * abs(same).max(), "caches in bf16, and in float32"
