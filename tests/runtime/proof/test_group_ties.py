"""Groups of experts at near ties: a proof takes the engine's groups there, and nowhere else."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moec.graph_builder import ops
from moec.graph_builder.parts import build_graph
from moec.runtime.cache import new_cache
from moec.runtime.engines.eager import fill
from moec.runtime.proof.each_op.call import each_op
from moec.runtime.proof.each_op.distance import Distance
from moec.spec import names
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint
from tests.families import CASES

LAYER, SPEC = 1, CASES["deepseek-v3"]
#: of eight experts in four groups of two, two of which are kept: the last is clearly the best
SCORES = torch.tensor([0.30, 0.50, 0.45, 0.35, 0.20, 0.30, 0.60, 0.70])


def distance_of(folder: Path, kept: list[int], closer: float) -> Distance:
    """How far the ranks of an engine that keeps the groups `kept` are from the right ones.

    The second group is worse than the first by `closer`.
    """
    write_random_checkpoint(SPEC, folder, seed=1)
    spec, _, entries = read_model(folder)
    graph = build_graph(spec, "fp16")
    fill(graph, entries)
    bias = dict(graph.named_parameters())[names.moe(LAYER, "router", "bias")].float()
    scores = SCORES.clone()
    scores[2] -= closer
    logits = (scores - bias).logit()[None].half()
    every = ops.ranks.eager(logits, bias, "sigmoid", 1, 1)
    mine = torch.zeros(4, dtype=torch.bool)
    mine[kept] = True
    ranks = every.masked_fill(~mine.repeat_interleave(2), -torch.inf)
    feeds: dict[str, Tensor] = {
        names.INPUT_IDS: torch.zeros(1, 1, dtype=torch.int64),
        names.PAST_LENGTHS: torch.zeros(1, dtype=torch.int64),
        names.LENGTHS: torch.ones(1, dtype=torch.int64),
        names.LOGIT_INDEX: torch.zeros(1, 1, dtype=torch.int64),
        **new_cache(spec, "fp16", 1, 0).tensors,
    }
    found = {names.router(LAYER): logits, names.ranks(LAYER): ranks}
    every_one = {each.name: each for each in each_op(graph, feeds, found, torch.ones(1), {})}
    return every_one[names.ranks(LAYER)]


@pytest.mark.parametrize("kept", [[0, 3], [1, 3]])
def test_either_group_is_right_at_a_near_tie(kept: list[int], tmp_path: Path) -> None:
    assert distance_of(tmp_path, kept, closer=1e-4).ratio <= 1


@pytest.mark.parametrize("kept", [[1, 3], [2, 3], [0, 1], [3], [0, 1, 3]])
def test_a_worse_group_or_another_number_is_wrong(kept: list[int], tmp_path: Path) -> None:
    wrong = distance_of(tmp_path, kept, closer=0.1)
    assert math.isnan(wrong.error)  # -inf where a number should be, or the other way
    assert distance_of(tmp_path / "right", [0, 3], closer=0.1).ratio <= 1
