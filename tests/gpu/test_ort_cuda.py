"""Target ort on CUDA: the trained checkpoint, and the experts at Scout's widths."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import moec
from moec.artefact.artefact import open_artefact
from moec.runtime.open import artefact_session
from moec.runtime.session import Session
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.weights.checkpoint import read_checkpoint
from moec.weights.random import write_random_checkpoint
from moec.weights.view import TORCH_DTYPES, view
from tests.proofs import assert_passed
from tests.talks import check_five_turns, with_template

#: precision -> largest error of a logit over the largest logit, share of equal choices, perplexity
LIMITS = {"fp16": (1e-2, 0.985, 0.005), "bf16": (6e-2, 0.95, 0.02)}


@pytest.fixture(scope="module", params=list(LIMITS))
def session(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Session:
    out = tmp_path_factory.mktemp("cuda") / request.param
    art = moec.export(tiny, target="ort", precision=request.param, weights="pack", out=out)
    return moec.open_session(art.path, device="cuda")


def test_golden_logits_choices_and_perplexity(session: Session, golden: dict[str, Tensor]) -> None:
    assert session.artefact
    error, agreement, perplexity = LIMITS[session.artefact.manifest.precision]
    logits = session.logits(golden["input_ids"])
    off = (logits[:, -48:] - golden["logits"]).flatten(0, 1).norm(dim=1)
    assert (off / golden["logits"].flatten(0, 1).norm(dim=1)).median() < error
    assert (logits.argmax(-1) == golden["argmax"]).float().mean() >= agreement
    windows = golden["eval_ids"]
    loss = functional.cross_entropy(session.logits(windows[:, :-1]).transpose(1, 2), windows[:, 1:])
    assert abs(loss.exp().item() / 13.3217 - 1) < perplexity


def test_rows_of_a_batch_are_rows_alone(session: Session) -> None:
    """Lengths 1, 7, 130, 400; decode past three chunk borders of 128."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    rows = [torch.randint(0, 4096, (n,), generator=generator) for n in (1, 7, 130, 400)]
    steps = torch.randint(0, 4096, (len(rows), 100), generator=generator)
    together = _decode(session, [row.tolist() for row in rows], steps)
    for index, row in enumerate(rows):
        alone = _decode(session, [row.tolist()], steps[index : index + 1])
        ratio = (together[:, index] - alone[:, 0]).norm() / alone.norm()
        assert ratio < (5e-3 if session.precision == "fp16" else 6e-2)


@pytest.mark.parametrize("precision", LIMITS)
def test_five_turns_are_one_call_with_the_whole_text(
    precision: str, tiny: Path, tmp_path: Path
) -> None:
    checkpoint = with_template(tiny, tmp_path / "checkpoint")
    made = moec.export(checkpoint, target="ort", precision=precision, out=tmp_path / "a").path
    check_five_turns(moec.open_session(made, device="cuda"), made, LIMITS[precision][0])


def _decode(session: Session, rows: list[list[int]], steps: Tensor) -> Tensor:
    logits, cache = session.prefill(rows, capacity=520)
    return torch.stack([x.cpu() for x in (logits, *(session.decode(t, cache) for t in steps.T))])


def test_the_proof_passes(session: Session) -> None:
    assert session.artefact
    report = moec.validate(session.artefact.path, device="cuda")
    assert_passed(report)


@pytest.fixture(scope="module")
def scout_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MoE layer of Scout's widths, with random weights."""
    first = {"attention": "L", "rope": "R", "qk_norm": "Q", "temperature": "-", "ffn": "M"}
    text = PRESETS["scout"].text.model_copy(update={"layers": 1, "vocab": 1024, **first})
    spec = ModelSpec(name="layer", provenance="custom", dtype="bf16", text=text)
    folder = tmp_path_factory.mktemp("layer")
    write_random_checkpoint(spec, folder, torch.seed() % 2**31, device="cuda")
    return folder


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_experts_of_every_token_count_to_70(
    scout_layer: Path, precision: str, tmp_path: Path
) -> None:
    """The operator chooses its kernel by the number of tokens; one layout fails at 1, 3, 4, 64."""
    art = moec.export(
        scout_layer, target="ort", precision=precision, weights="pack", out=tmp_path / "art"
    )
    names = ["layers.0.ffn.norm", "layers.0.moe.route.1", "layers.0.moe.router"]
    session = artefact_session(
        open_artefact(art.path), "cuda", taps=[*names, "layers.0.moe.routed"]
    )
    gate_up, down = _experts(scout_layer)
    ids = torch.randint(0, 1024, (1, 70))
    worst = {}
    for count in range(1, 71):
        out = session.trace(ids[:, :count], torch.tensor([count]), [*names, "layers.0.moe.routed"])
        x, chosen = out[names[0]].cuda().float(), out[names[1]][:, 0].cuda()
        score = out[names[2]].cuda().float().amax(1, keepdim=True).sigmoid()
        x = (x * score).to(TORCH_DTYPES[precision]).float()
        expected = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            mine = chosen == expert
            gate, up = (x[mine] @ gate_up[expert].float()).chunk(2, -1)
            expected[mine] = (functional.silu(gate) * up) @ down[expert].float()
        found = out["layers.0.moe.routed"].cuda().float()
        worst[count] = float((found - expected).norm() / expected.norm())
    limit = 1e-2 if precision == "bf16" else 2e-3
    print(f"{precision}: largest relative error {max(worst.values()):.1e}")
    assert max(worst.values()) < limit, {n: e for n, e in worst.items() if e >= limit}


def _experts(folder: Path) -> tuple[Tensor, Tensor]:
    tensors = read_checkpoint(folder).tensors
    stem = "model.layers.0.feed_forward.experts"
    gate_up, down = (view(tensors[f"{stem}.{x}_proj"]).cuda() for x in ("gate_up", "down"))
    return gate_up, down
