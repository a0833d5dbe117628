"""Given values stand in for a graph's own: the same outputs if they are its own, no others."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from moec.graph_builder.parts import build_graph
from moec.graph_builder.passes.inject import inject
from moec.graph_builder.passes.tap import tap
from moec.graph_builder.types import TensorType
from moec.runtime.cache import new_cache
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.scheme import SCHEMES

LAYERS = 3
SPEC = reduced(PRESETS["tiny-scout"], LAYERS).model_copy(update={"vision": None})
SPECS = {"wide": SPEC, "fp8": SPEC.model_copy(update={"scheme": SCHEMES["dynamic"]})}


def _filled(spec: ModelSpec) -> fx.GraphModule:
    graph = build_graph(spec)
    graph.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, weight in graph.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        scale = 100 if weight.dtype == torch.float8_e4m3fn else 0.3
        weight.copy_(noise.abs() * 0.002 if name.endswith("_scale") else noise * scale)
    return graph


def _run(
    graph: fx.GraphModule, spec: ModelSpec, given: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    feeds = {
        "input_ids": torch.arange(14).reshape(2, 7),
        "past_lengths": torch.zeros(2, dtype=torch.int64),
        "lengths": torch.tensor([7, 5]),
        "logit_index": torch.arange(7).repeat(2, 1),
        **new_cache(spec, "fp32", 2, 4).tensors,
        **{f"{name}.given": value for name, value in (given or {}).items()},
    }
    nodes = list(graph.graph.nodes)
    inputs = [feeds[node.meta["name"]] for node in nodes if node.op == "placeholder"]
    return dict(zip(nodes[-1].meta["outputs"], graph(*inputs), strict=True))


def _inner(graph: fx.GraphModule) -> list[str]:
    """Names of all tensors that the graph computes."""
    nodes = (node for node in graph.graph.nodes if node.op == "call_function")
    return [node.meta["name"] for node in nodes if isinstance(node.meta["type"], TensorType)]


NAMES = {kind: _inner(build_graph(spec)) for kind, spec in SPECS.items()}


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(list(SPECS)), data=st.data())
def test_a_graph_fed_its_own_values_gives_the_same(kind: str, data: st.DataObject) -> None:
    spec = SPECS[kind]
    names = data.draw(st.lists(st.sampled_from(NAMES[kind]), unique=True, min_size=1))
    plain = _filled(spec)
    outputs = list(plain.graph.nodes)[-1].meta["outputs"]
    own = _run(tap(plain, names), spec)
    found = _run(inject(_filled(spec), names), spec, {name: own[name] for name in names})
    assert tuple(found) == outputs
    for name in outputs:
        assert torch.equal(found[name], own[name]), name


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("at", range(LAYERS))
def test_another_value_changes_only_what_comes_after(kind: str, at: int) -> None:
    spec, given = SPECS[kind], f"layers.{at}.out"
    outs = [f"layers.{layer}.out" for layer in range(LAYERS)]
    own = _run(tap(_filled(spec), outs), spec)
    graph = tap(inject(_filled(spec), [given]), outs)
    found = _run(graph, spec, {given: own[given].flip(0) + 1})
    changed = {name for name in own if not torch.equal(own[name], found[name])}
    after = range(at + 1, LAYERS)
    caches = {f"present.{layer}.{part}" for layer in after for part in ("key", "value")}
    assert changed == {"logits", *caches, *(f"layers.{layer}.out" for layer in after)}


def test_inputs_and_values_that_are_not_named_stay() -> None:
    graph = inject(_filled(SPEC), ["input_ids"])
    names = [node.meta["name"] for node in graph.graph.nodes if node.op == "placeholder"]
    assert not [name for name in names if name.endswith(".given")]
    assert _inner(graph) == NAMES["wide"]


def test_a_value_that_is_not_there_is_refused() -> None:
    with pytest.raises(MoecError, match=r"inject\n.*layers\.9\.out"):
        inject(build_graph(SPECS[next(iter(SPECS))]), ["embed", "layers.9.out"])
