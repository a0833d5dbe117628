"""A rank's graph: who adds up partial sums, how often ranks meet, and the types of all values."""

from collections import Counter
from collections.abc import Iterator
from operator import getitem
from typing import Any

import pytest
from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.fused import build_fused
from moec.graph_builder.ops.registry import OPS
from moec.graph_builder.passes.fused.shard import is_partial
from moec.graph_builder.weights import weights_of
from moec.spec.files import load_scheme
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.sharding import ALONE, Rank, local
from moec.weights.joined import joined_tensors
from moec.weights.view import STORED

#: ops that add up partial sums of all ranks, whatever else they do
SUMS = {
    ops.all_reduce.target,
    ops.all_reduce_norm.target,
    ops.all_reduce_norm_fp8.target,
    ops.moe_all_reduce_norm_fp8.target,
}
KEPT = ("name", "type", "role", "outputs")
#: weights whose inputs are divided; a product with one is a partial sum
PARTIAL = ("attn.o.weight", "ffn.down.weight", "moe.down")
#: ops that select rows of a value, partial sum or not
CARRIERS = {ops.unpack.target, ops.select.target}


def in_fp8(preset: str) -> ModelSpec:
    return PRESETS[preset].model_copy(update={"scheme": load_scheme("dynamic")})


def with_sizes(spec: ModelSpec, **text: int) -> ModelSpec:
    return spec.model_copy(update={"text": spec.text.model_copy(update=text)})


#: dense and MoE layers alternate in Maverick
MODELS = {
    "scout": reduced(in_fp8("scout"), 5),
    "repeated heads": with_sizes(reduced(in_fp8("scout"), 4), heads=8),
    "maverick": reduced(in_fp8("maverick"), 4),
    "dense at the end": reduced(in_fp8("maverick"), 3),
    "uneven": with_sizes(in_fp8("tiny-scout"), heads=6, kv_heads=3, vocab=4095),
}
CASES = [
    pytest.param(spec, Rank(index, count), id=f"{name}, {index} of {count}")
    for name, spec in MODELS.items()
    for index, count in ([(3, 4)] if name == "repeated heads" else [(0, 2), (1, 2)])
]


@pytest.fixture(params=["bf16", "fp32"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def users_of(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The ops that use a value, or rows of it that were selected, and what each of them gets."""
    for user in node.users:
        if user.target in CARRIERS:
            yield from users_of(user)
        else:
            yield user, node


def source_of(node: fx.Node) -> fx.Node:
    """What the rows of `node` were selected from."""
    return source_of(node.args[0]) if node.target in CARRIERS else node  # type: ignore[arg-type]


@pytest.mark.parametrize("spec, rank", CASES)
def test_partial_sums_reach_only_ops_that_add_them_up(
    spec: ModelSpec, rank: Rank, precision: str
) -> None:
    graph = build_fused(spec, precision, rank=rank)
    partial = {
        node: set(node.users)
        for node in calls(graph)
        if any(name.endswith(PARTIAL) for each in node.all_input_nodes for name in weights_of(each))
    }
    inside = {node for node in partial if node.target == ops.moe_all_reduce_norm_fp8.target}
    for node in partial.keys() - inside:
        assert is_partial(node)
        assert node.users and {user.target for user, _ in users_of(node)} <= SUMS, node
        for user, part in users_of(node):  # and not as the part that is whole already
            assert user.args[0 if user.target == ops.all_reduce.target else 1] is part
    assert len(partial) == 2 * spec.text.layers
    for node in calls(graph):
        if node.target in SUMS - {ops.moe_all_reduce_norm_fp8.target}:
            given: Any = node.args[0 if node.target == ops.all_reduce.target else 1]
            part = source_of(given)
            assert part in partial or part.target == ops.embedding_part.target, "nothing adds twice"


@pytest.mark.parametrize("spec, rank", CASES)
def test_ranks_meet_once_for_tokens_twice_a_layer_and_once_for_logits(
    spec: ModelSpec, rank: Rank, precision: str
) -> None:
    nodes = calls(build_fused(spec, precision, rank=rank))
    count = Counter(node.target for node in nodes)
    assert sum(count[each] for each in SUMS) == 1 + 2 * spec.text.layers
    assert count[ops.embedding_part.target] == count[ops.all_gather.target] == 1
    assert not count[ops.embedding.target]
    (rows,) = (node for node in nodes if node.target == ops.embedding_part.target)
    assert {user.target for user in rows.users} == {ops.all_reduce.target}
    (gather,) = (node for node in nodes if node.target == ops.all_gather.target)
    each = [local(spec, Rank(index, rank.count)).text.vocab for index in range(rank.count)]
    assert gather.args[1] == each and sum(each) == spec.text.vocab
    assert rows.args[2] == sum(each[: rank.index])
    # no op adds to the residual stream what is not yet a sum.
    assert not count[ops.skip_norm.target] + count[ops.skip_norm_fp8.target]
    assert not count[ops.norm_moe.target] + count[ops.norm_moe_norm_fp8.target]


#: sums that say, in the argument of this number, whether their total is needed whole
WHOLE = {
    ops.all_reduce_norm.target: 4,
    ops.all_reduce_norm_fp8.target: 4,
    ops.moe_all_reduce_norm_fp8.target: 3,
}


def results(node: fx.Node) -> dict[int, fx.Node]:
    return {each.args[1]: each for each in node.users}  # type: ignore[misc]


@pytest.mark.parametrize("spec, rank", CASES)
def test_a_total_that_more_than_the_next_sum_uses_is_whole(
    spec: ModelSpec, rank: Rank, precision: str
) -> None:
    graph = build_fused(spec, precision, rank=rank)
    # the last norm adds to selected rows of the total before it
    assert check_results_last_until_the_next_sum(graph) == 2 * spec.text.layers - 1


def check_results_last_until_the_next_sum(graph: fx.GraphModule) -> int:
    """Check what sums give that is not kept; return how many sums have such results.

    Only the next sum uses the total, as what it adds to, and nothing after it uses the others.
    """
    nodes = list(graph.graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    sums = [node for node in nodes if node.target in WHOLE]
    apart = [each for each in sums if not each.args[WHOLE[each.target]]]
    for node in apart:
        after = next((each for each in sums if place[each] > place[node]), nodes[-1])
        for index, value in results(node).items():
            assert all(place[user] <= place[after] for user in value.users)
            assert nodes[-1] not in value.users
            if index == len(node.meta["type"]) - 1:
                assert set(value.users) <= {after}
                assert not value.users or after.args[0] is value
    return len(apart)


def test_with_taps_results_last_too() -> None:
    spec = MODELS["maverick"]
    names = [f"layers.{i}.{name}" for i in range(spec.text.layers) for name in ("out", "ffn.norm")]
    names += [f"layers.{i}.moe.router" for i in range(1, spec.text.layers, 2)]
    graph = build_fused(spec, "bf16", taps=names, rank=Rank(0, 2))
    assert check_results_last_until_the_next_sum(graph) < 2 * spec.text.layers - 1


def test_a_total_that_somebody_looks_at_is_whole() -> None:
    name = "layers.1.out"
    graph = build_fused(MODELS["scout"], "bf16", taps=[name], rank=Rank(0, 2))
    (value,) = (node for node in graph.graph.nodes if node.meta.get("name") == name)
    source = value
    while source.target not in WHOLE:
        source = source.all_input_nodes[0]
    assert source.args[WHOLE[source.target]]


@pytest.mark.parametrize("spec, rank", CASES)
def test_types_are_those_of_the_shape_rules(spec: ModelSpec, rank: Rank, precision: str) -> None:
    for node in calls(build_fused(spec, precision, rank=rank)):
        if node.target is getitem:
            source: Any = node.args[0]
            found = source.meta["type"][node.args[1]]
        else:
            given = fx.map_arg(node.args, lambda each: each.meta["type"])
            found = OPS[node.target._schema.name.partition("::")[2]].rule(*given)  # type: ignore[union-attr]
        assert node.meta["type"] == found, node.meta["name"]


@pytest.mark.parametrize("spec, rank", CASES)
def test_results_have_the_names_and_sizes_of_the_whole_program(
    spec: ModelSpec, rank: Rank, precision: str
) -> None:
    whole, own = (build_fused(spec, precision, rank=each) for each in (ALONE, rank))
    results = [list(graph.graph.nodes)[-1] for graph in (whole, own)]
    for node in results:
        assert node.meta["outputs"] == ("logits",)
    types = [node.args[0][0].meta["type"] for node in results]  # type: ignore[index,union-attr]
    assert types[0] == types[1] and types[0].shape[-1] == spec.text.vocab
    names = [[n.meta["name"] for n in g.graph.nodes if n.op == "placeholder"] for g in (whole, own)]
    assert names[0] == names[1], "all ranks take the same inputs"
    residual = {f"layers.{i}.attn.residual" for i in range(spec.text.layers)} | {"embed"}
    assert residual <= {node.meta.get("name") for node in own.graph.nodes}


@pytest.mark.parametrize("spec, rank", CASES)
def test_weights_are_those_of_the_rank(spec: ModelSpec, rank: Rank, precision: str) -> None:
    graph = build_fused(spec, precision, rank=rank)
    found = {name: (tuple(each.shape), each.dtype) for name, each in graph.named_parameters()}
    joined = joined_tensors(local(spec, rank), precision)
    assert found == {name: (each.shape, STORED[each.dtype]) for name, each in joined.items()}


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_a_process_alone_has_the_graph_that_it_has_without_the_pass(
    spec: ModelSpec, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = build_fused(spec, precision, rank=Rank(0, 1))
    monkeypatch.setattr("moec.graph_builder.fused.shard", lambda graph, *_: graph)
    plain = build_fused(spec, precision)
    assert str(alone.graph) == str(plain.graph)
    for mine, other in zip(alone.graph.nodes, plain.graph.nodes, strict=True):
        assert [mine.meta.get(key) for key in KEPT] == [other.meta.get(key) for key in KEPT]
    together = SUMS | {ops.embedding_part.target, ops.all_gather.target}
    assert not together & {node.target for node in calls(alone)}


def test_a_value_that_is_a_sum_keeps_its_name_as_a_tap() -> None:
    """Whoever looks at inner values sees those of all ranks together."""
    spec, rank = MODELS["maverick"], Rank(1, 2)
    taps = ["embed", "layers.0.out", "layers.1.out", "layers.1.attn.residual", "layers.3.out"]
    graph = build_fused(spec, "fp32", taps, rank=rank)
    output: Any = list(graph.graph.nodes)[-1]
    assert output.meta["outputs"] == ("logits", *taps)
    for node in output.args[0]:
        assert not is_partial(node) and node.target != ops.embedding_part.target
