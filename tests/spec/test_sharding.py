"""How ranks share a model: each part is somewhere, once, and parts are as equal as they can be."""

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.spec import names
from moec.spec.files import load_scheme
from moec.spec.model import ModelSpec, TextSpec
from moec.spec.parameters import text_parameters
from moec.spec.presets import PRESETS
from moec.spec.sharding import (
    ALONE,
    UNIT,
    Divided,
    Rank,
    check_ranks,
    cut_of,
    length,
    local,
    span,
)
from moec.weights.joined import joined_tensors
from tests.refusals import refusal

TINY = PRESETS["tiny-scout"]
HEADS = ("heads", "kv_heads")
#: of which a rank has the inputs that it has made itself
DOWN = ("attn.o.weight", "ffn.down.weight", "moe.down", "moe.shared.down.weight", ".down.weight")


def with_sizes(hidden: int = 64, **text: int) -> ModelSpec:
    """tiny-scout in other sizes."""
    experts = TINY.text.experts.model_copy(update={"hidden": hidden, "shared_hidden": hidden})
    changed = TINY.text.model_copy(update={**text, "experts": experts})
    return TINY.model_copy(update={"text": changed})


def each_rank(count: int) -> list[Rank]:
    return [Rank(index, count) for index in range(count)]


def sizes(text: TextSpec) -> dict[Divided, int]:
    """Every size that is divided, in elements."""
    found: dict[Divided, int] = {
        "vocab": text.vocab,
        "heads": text.heads * text.head_dim,
        "kv_heads": text.kv_heads * text.head_dim,
    }
    if text.dense_hidden:
        found["dense_hidden"] = text.dense_hidden
    if text.experts:
        found["hidden"] = text.experts.hidden
    return found


def sizes_of(spec: ModelSpec, rank: Rank) -> dict[Divided, int]:
    return sizes(local(spec, rank).text)


def check_parts(spec: ModelSpec, count: int) -> None:
    """The parts of all ranks are the whole, in order, and agree with the sizes of each rank."""
    text = spec.text
    for divided, size in sizes(text).items():
        parts = [span(text, divided, rank) for rank in each_rank(count)]
        assert [length(part) for part in parts] == [
            sizes_of(spec, rank)[divided] for rank in each_rank(count)
        ]
        covered = [at for part in dict.fromkeys(parts) for at in range(*part)]
        assert covered == list(range(size)), divided
        if divided == "kv_heads" and text.kv_heads < count:
            assert [parts.count(part) for part in set(parts)] == [count // text.kv_heads] * (
                text.kv_heads
            )
        else:
            assert len(set(parts)) == count, "no two ranks have the same"
    for rank in each_rank(count):  # the heads that read a key/value head are where it is
        group = text.heads // text.kv_heads
        queries, keys = (span(text, divided, rank) for divided in ("heads", "kv_heads"))
        ((first, stop), (kv_first, kv_stop)) = (
            (start // text.head_dim, end // text.head_dim) for start, end in (queries, keys)
        )
        assert {head // group for head in range(first, stop)} == set(range(kv_first, kv_stop))
        own = local(spec, rank).text
        assert own.heads % own.kv_heads == 0, "each key/value head has as many query heads"


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("preset", ["scout", "maverick"])
def test_parts_of_presets_are_the_whole(preset: str, count: int) -> None:
    check_parts(PRESETS[preset], count)


@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_the_example_are_the_whole(count: int) -> None:
    check_parts(TINY, count)


@st.composite
def shared_models(draw: st.DrawFn) -> tuple[ModelSpec, int]:
    """A model, and a number of ranks that can share it."""
    count = draw(st.integers(1, 6))
    kv_heads = draw(st.sampled_from([n for n in range(1, 9) if n >= count or count % n == 0]))
    sharing = max(1, count // kv_heads) if kv_heads < count else 1
    width = st.integers(count, 700)
    spec = with_sizes(
        draw(width),
        heads=kv_heads * sharing * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 8])),
        vocab=draw(width),
        dense_hidden=draw(width),
    )
    return spec, count


@given(shared_models())
def test_parts_of_any_sizes_are_the_whole(shared: tuple[ModelSpec, int]) -> None:
    check_parts(*shared)


@given(shared_models())
def test_parts_are_as_equal_as_sizes_allow(shared: tuple[ModelSpec, int]) -> None:
    spec, count = shared
    for divided in ("vocab", "dense_hidden", "hidden"):
        found = [sizes_of(spec, rank)[divided] for rank in each_rank(count)]
        assert max(found) - min(found) <= UNIT
        if sum(found) % count == 0:
            assert len(set(found)) == 1
        assert found == sorted(found, reverse=True), "the first ranks have more"


@pytest.mark.parametrize(
    "size, count, expected",
    [
        (1280, 3, [512, 384, 384]),  # ten units of 128
        (1152, 3, [384, 384, 384]),
        (192, 2, [96, 96]),  # equal parts before units
        (96, 2, [48, 48]),
        (64, 3, [32, 16, 16]),  # units of which three ranks have one each
        (7, 3, [3, 2, 2]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_widths_that_ranks_share_in_units(size: int, count: int, expected: list[int]) -> None:
    spec = with_sizes(size, heads=6, kv_heads=3, dense_hidden=size)
    for divided in ("hidden", "dense_hidden"):
        assert [sizes_of(spec, rank)[divided] for rank in each_rank(count)] == expected


def test_three_key_value_heads_on_two_ranks() -> None:
    spec = with_sizes(heads=6, kv_heads=3, head_dim=8)
    assert [local(spec, rank).text.kv_heads for rank in each_rank(2)] == [2, 1]
    assert [span(spec.text, "heads", rank) for rank in each_rank(2)] == [(0, 32), (32, 48)]
    assert [span(spec.text, "kv_heads", rank) for rank in each_rank(2)] == [(0, 16), (16, 24)]


def test_two_key_value_heads_on_four_ranks() -> None:
    spec = with_sizes(heads=8, kv_heads=2, head_dim=4)
    assert [span(spec.text, "heads", rank) for rank in each_rank(4)] == [
        (0, 8), (8, 16), (16, 24), (24, 32),
    ]  # fmt: skip
    assert [span(spec.text, "kv_heads", rank) for rank in each_rank(4)] == [
        (0, 4), (0, 4), (4, 8), (4, 8),
    ]  # fmt: skip


def test_nothing_changes_for_a_process_alone() -> None:
    assert local(TINY, ALONE) is TINY


# ---------------------------------------------------------------- what is cut


def in_fp8(preset: str, **scheme: Any) -> ModelSpec:
    own = load_scheme("dynamic").model_copy(update=scheme)
    return PRESETS[preset].model_copy(update={"scheme": own})


@pytest.mark.parametrize("layout", ["moec", "compressed-tensors"])  # the second has experts apart
@pytest.mark.parametrize("preset", ["tiny-scout", "scout", "maverick"])
def test_what_is_whole_is_a_norm_a_router_or_a_scale_of_divided_inputs(
    preset: str, layout: str
) -> None:
    spec = in_fp8(preset, layout=layout)
    sources = [name for each in joined_tensors(spec).values() for name in each.sources]
    assert len(sources) > len(text_parameters(spec)), "weights, and their scales"
    whole = [name for name in sources if cut_of(name) is None]
    for name in whole:
        scales = names.is_scale(name) and names.scaled(name).endswith(DOWN)
        assert names.is_norm(name) or names.is_router(name) or scales, name
    cuts = {name: cut for name in sources if (cut := cut_of(name))}
    for name, cut in cuts.items():
        assert (cut.axis == -1) == (not names.is_scale(name) and name.endswith(DOWN)), name
        assert cut.divided in get_args(Divided)
        parameter = names.scaled(name) if names.is_scale(name) else name
        assert cut.repeats == 1 + parameter.endswith("moe.gate_up"), name


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "sizes, count, named",
    [
        ({}, 3, "3 ranks: text.heads"),
        ({"heads": 4, "kv_heads": 2}, 8, "8 ranks: text.heads"),
        ({"heads": 6, "kv_heads": 2}, 4, "6 query heads, 2 of keys and values"),
        ({"heads": 12, "kv_heads": 3, "hidden": 2}, 3, "3 ranks: text.hidden"),
        ({"vocab": 1}, 2, "2 ranks: text.vocab"),
        ({"dense_hidden": 1}, 2, "2 ranks: text.dense_hidden"),
    ],
)
def test_sizes_that_ranks_cannot_share_are_refused(
    sizes: dict[str, int], count: int, named: str
) -> None:
    error = refusal(lambda: check_ranks(with_sizes(**sizes), count), named)
    assert "--gpus" in error.next_step and f"--gpus {count}" not in error.next_step


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ranks_that_can_share_are_not_refused(count: int) -> None:
    check_ranks(TINY, count)
