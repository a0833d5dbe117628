"""Near ties of routers in another engine, which shows no choices of experts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moec.runtime.open import eager_session
from moec.runtime.proof.against.flips import own_tokens, settled_values
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint

SPEC = reduced(PRESETS["tiny-scout"], 4).model_copy(update={"vision": None})
IDS, NEW = [7, 30, 11, 52, 40, 3, 29, 18], [5, 6]
Change = Callable[[dict[str, Tensor]], object]


def router(weights: dict[str, Tensor]) -> Tensor:
    return weights["model.layers.1.feed_forward.router.weight"]


def tie(weights: dict[str, Tensor]) -> None:
    """Let two experts of layer 1 have the same logits, and be chosen by most tokens."""
    router(weights)[1] = router(weights)[0]
    router(weights)[2:] *= 1e-3


def lead(weights: dict[str, Tensor]) -> None:
    """Let one of them lead clearly."""
    tie(weights)
    router(weights)[1] *= 0.9


def swap(weights: dict[str, Tensor]) -> None:
    """Swap them: what an engine computes that chooses the other one at each tie."""
    for part in ("gate_up_proj", "down_proj"):
        stack = weights[f"model.layers.1.feed_forward.experts.{part}"]
        stack[[0, 1]] = stack[[1, 0]]


def scale(weights: dict[str, Tensor]) -> None:
    weights["model.layers.1.feed_forward.experts.down_proj"][:2] *= 1.05


def likely(folder: Path, *changes: Change) -> Tensor:
    """The log-probabilities of the prompt's tokens, with the weights changed."""
    write_random_checkpoint(SPEC, folder, seed=5)
    weights = load_file(folder / "model.safetensors")
    for change in changes:
        change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    spec, _, entries = read_model(folder)
    row = torch.tensor([[*IDS, *NEW]])
    found = eager_session(spec, entries, "fp32").trace(row, torch.tensor([row.shape[1]]), [])
    return own_tokens(found["logits"].double().log_softmax(-1), IDS)


def off(folder: Path, theirs: Tensor, least: float = 1e-4) -> tuple[float, int]:
    """How far `theirs` is from the reference that follows it, and at how many ties it does."""
    spec, _, entries = read_model(folder)
    values, flips = settled_values(spec, entries, IDS, NEW, theirs, least)
    return float((theirs - own_tokens(values["logits"], IDS)).abs().max()), flips


def test_the_reference_takes_the_experts_that_an_engine_took(tmp_path: Path) -> None:
    own, other = likely(tmp_path / "own", tie), likely(tmp_path / "other", tie, swap)
    assert float((own - other).abs().max()) > 1e-2
    assert off(tmp_path / "own", own) == (pytest.approx(0, abs=1e-9), 0)
    distance, flips = off(tmp_path / "own", other)
    assert distance < 1e-5 and 0 < flips <= len(IDS)
    assert off(tmp_path / "own", other, torch.inf)[1] == 0


def test_only_at_near_ties(tmp_path: Path) -> None:
    """Without a tie, experts that were swapped are wrong."""
    likely(tmp_path / "own", lead)
    distance, flips = off(tmp_path / "own", likely(tmp_path / "other", lead, swap))
    assert distance > 1e-2 and flips == 0


def test_a_wrong_expert_stays_wrong_at_near_ties(tmp_path: Path) -> None:
    likely(tmp_path / "own", tie)
    for changes in ((tie, scale), (tie, swap, scale)):
        assert off(tmp_path / "own", likely(tmp_path / "other", *changes))[0] > 1e-4
