"""Plans of models that several GPUs share, beside the graph and the weights of a rank."""

import math

import pytest

from moec.graph_builder.fused import build_fused
from moec.spec import names
from moec.spec.data import BYTES
from moec.spec.files import load_scheme
from moec.spec.model import ModelSpec
from moec.spec.parameters import text_parameters
from moec.spec.plan import Plan, plan
from moec.spec.plan_ranks import least_gpus
from moec.spec.presets import PRESETS
from moec.spec.sharding import Rank, local
from moec.weights.joined import joined_tensors
from tests.refusals import refusal

MILLION = 1_048_576


def in_fp8(preset: str) -> ModelSpec:
    return PRESETS[preset].model_copy(update={"scheme": load_scheme("dynamic")})


def of_each_rank(preset: str, gpus: int, context: int = 8192) -> list[Plan]:
    spec = in_fp8(preset)
    return [plan(local(spec, Rank(i, gpus)), context=context) for i in range(gpus)]


def bytes_of(spec: ModelSpec) -> float:
    tensors = joined_tensors(spec).values()
    return sum(math.prod(each.shape) * BYTES[each.dtype] for each in tensors)


@pytest.mark.parametrize("preset, gpus", [("tiny-scout", 2), ("scout", 2), ("maverick", 4)])
def test_weights_are_those_that_a_rank_has(preset: str, gpus: int) -> None:
    own = local(in_fp8(preset), Rank(0, gpus))
    found = plan(preset, "fp8", gpus=gpus).weights_bytes
    assert found == pytest.approx(bytes_of(own), rel=1e-3)


def test_weights_of_all_ranks_are_the_model_and_copies_of_what_is_whole() -> None:
    spec, gpus = in_fp8("scout"), 4
    text = spec.text
    routers_and_norms = 2 * sum(
        math.prod(shape)
        for name, shape in text_parameters(spec).items()
        if names.is_router(name) or names.is_norm(name)
    )
    scales = 4 * text.dim * text.layers * (1 + text.expert_count + 1)  # of o and of all down
    copied = routers_and_norms + scales
    parts = sum(each.weights_bytes for each in of_each_rank("scout", gpus))
    assert parts == plan(spec).weights_bytes + (gpus - 1) * copied
    assert plan(spec, gpus=gpus).weights_bytes == parts // gpus


def test_caches_and_work_of_all_ranks_add_up_to_the_whole() -> None:
    whole = plan(in_fp8("maverick"), context=MILLION)
    ranks = of_each_rank("maverick", 4, MILLION)
    assert sum(each.cache_bytes for each in ranks) == whole.cache_bytes
    assert sum(each.full_cache_bytes for each in ranks) == whole.full_cache_bytes
    # each rank has a router of its own
    routers = 24 * 128 * 5120
    assert sum(each.decode_flops for each in ranks) == pytest.approx(
        whole.decode_flops + 3 * 2 * routers, rel=1e-3
    )


def test_the_first_rank_needs_most() -> None:
    ranks = of_each_rank("scout", 3)  # key/value heads: 3, 3 and 2
    assert [each.cache_bytes for each in ranks] == sorted(
        (each.cache_bytes for each in ranks), reverse=True
    )
    assert len({each.cache_bytes for each in ranks}) == 2
    found = plan("scout", "fp8", gpus=3)
    for name in ("weights_bytes", "cache_bytes", "decode_read_bytes", "decode_flops"):
        assert getattr(found, name) == max(getattr(each, name) for each in ranks)


def test_as_many_ranks_share_key_value_heads_as_there_are_too_few() -> None:
    assert (
        plan("tiny-scout", "fp8", gpus=4).cache_bytes
        == plan("tiny-scout", "fp8", gpus=2).cache_bytes
    )


def test_maverick_on_four() -> None:
    found = plan("maverick", "fp8", context=MILLION, device="h200", gpus=4)
    assert (found.fits, found.least_gpus) == (True, 4)
    assert found.weights_bytes == pytest.approx(100.84e9, rel=1e-4)
    # 2 of 8 key/value heads, all tokens in 12 layers, 8192 in 36: by hand
    assert found.cache_bytes == 2 * 2 * 128 * 2 * (12 * MILLION + 36 * 8192)
    assert found.decode_ms == pytest.approx(4.07, rel=1e-3)
    assert plan("maverick", "fp8", context=MILLION, device="h200", gpus=2).fits is False


def test_scout_on_two() -> None:
    found = plan("scout", "fp8", context=1024, device="h200", gpus=2)
    assert (found.fits, found.least_gpus) == (True, 1)
    assert found.weights_bytes == pytest.approx(54.97e9, rel=1e-4)
    assert found.decode_ms == pytest.approx(4.04 / 2, rel=2e-3)
    assert plan("scout", "fp8", device="h100").least_gpus == 2


def test_the_tower_is_on_every_gpu() -> None:
    one, two = (plan("scout", "fp8", device="h200", tiles=5, gpus=gpus) for gpus in (1, 2))
    assert (two.vision_bytes, two.vision_ms) == (one.vision_bytes, one.vision_ms)


@pytest.mark.parametrize(("gpus", "batch", "share"), [(2, 3, 1), (4, 3, 1), (2, 64, 1), (4, 64, 2)])
def test_collectives_are_those_of_the_fused_graph(gpus: int, batch: int, share: int) -> None:
    graph = build_fused(in_fp8("tiny-scout"), "bf16", rank=Rank(0, gpus)).graph
    ops = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    sums = sum("all_reduce" in each for each in ops)
    gathers = sum("all_gather" in each for each in ops)
    found = plan("tiny-scout", "fp8", batch=batch, gpus=gpus)
    assert (found.collectives, gathers) == (sums + gathers, 1)
    text = PRESETS["tiny-scout"].text
    logits = batch * text.vocab // gpus * 2
    assert found.collective_bytes == sums * batch * text.dim * 2 * 2 // share + logits


def test_one_gpu_has_nobody_to_send_to() -> None:
    found = plan("scout", "fp8")
    assert (found.gpus, found.collectives, found.collective_bytes) == (1, 0, 0)
    assert found.least_gpus is None, "nobody named a device"


@pytest.mark.parametrize(
    "preset, setting, least",
    [
        ("scout", {"precision": "fp8"}, 1),
        ("scout", {"precision": "bf16"}, None),  # only FP8 models are shared
        ("maverick", {"precision": "fp8"}, 4),
        ("maverick", {"precision": "fp8", "batch": 64, "context": 131_072}, 8),
        ("behemoth", {"precision": "fp8"}, None),
    ],
)
def test_least_gpus(preset: str, setting: dict[str, object], least: int | None) -> None:
    assert plan(preset, device="h200", **setting).least_gpus == least  # type: ignore[arg-type]


def test_a_number_of_gpus_that_cannot_share_is_passed_over() -> None:
    spec = in_fp8("qwen3-30b-a3b")
    narrow = spec.text.model_copy(update={"heads": 6, "kv_heads": 3})
    tried: list[int] = []

    def never(own: ModelSpec) -> bool:
        tried.append(own.text.heads)
        return False

    assert least_gpus(spec.model_copy(update={"text": narrow}), "fp8", never) is None
    assert tried == [6, 4], "4 and 8 GPUs cannot share three key/value heads"


@pytest.mark.parametrize(
    "preset, precision, gpus, named",
    [
        ("scout", "fp8", 0, "gpus"),
        ("scout", "bf16", 2, "fp8"),
        ("scout", "int4", 2, "fp8"),
        ("scout", "fp8", 16, "text.heads"),
        ("deepseek-v3", "fp8", 2, "layers.0.attn.q_up.weight"),
        ("deepseek-moe-16b", "fp8", 2, "moe.shared.gate.weight"),
        ("olmoe-1b-7b", "fp8", 2, "attn.q.norm.weight"),
    ],
)
def test_what_gpus_cannot_share_is_refused(
    preset: str, precision: str, gpus: int, named: str
) -> None:
    refusal(lambda: plan(preset, precision, gpus=gpus), named)
