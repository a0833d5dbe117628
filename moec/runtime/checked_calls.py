"""Refuse what a call of a session cannot take, before an engine sees it.

Engines trust their inputs: a length that is negative, or a cache of another model, would give
wrong numbers in one and a bare error in another.
"""

from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor

from moec.runtime.cache import Cache, cache_dtype, layer_shape
from moec.runtime.engines.engine import Layout
from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def read_column(tokens: Any) -> Tensor:
    """The tokens [B] of a decode step as ids, int64 [B, 1].

    Raises:
        MoecError: they are no integers, one for each sequence.
    """
    expected = "integers [batch], one token for each sequence"
    try:
        found = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        _refuse("tokens", f"{error}"[:200], expected)
    if found.dtype not in _INTEGERS or found.dim() != 1 or not len(found):
        _refuse("tokens", f"{found.dtype} {list(found.shape)}", expected)
    return found[:, None].long()


def check_capacity(capacity: Any, batch: Any) -> None:
    """Refuse a size of caches that is none.

    Raises:
        MoecError: it is no integer, or negative.
    """
    for name, given in (("capacity", capacity), ("batch", batch)):
        if isinstance(given, bool) or not isinstance(given, Integral) or given < 0:
            _refuse(name, repr(given)[:200], "an integer, 0 or more")


def check_batch(most: int | None, batch: int) -> None:
    """Refuse more sequences than the `most` that an engine takes; None: it takes any number.

    Otherwise only the first decode step would fail.

    Raises:
        MoecError: the message says how to build for more.
    """
    if most is not None and batch > most:
        refuse(
            f"{batch} rows",
            f"an engine for a batch of {most}",
            f"{most} or fewer",
            f"give it fewer at once, or build with --batch {batch}",
        )


def check_context(context: int | None, positions: int) -> None:
    """Refuse more positions than the `context` that an engine was compiled for; None: any.

    Raises:
        MoecError: the message says how to build for more.
    """
    if context is not None and positions > context:
        refuse(
            f"{positions} positions",
            f"an engine for a context of {context}",
            f"{context} or fewer",
            f"build with --context {positions}",
        )


def check_call(
    spec: ModelSpec, precision: str, layout: Layout, ids: Any, lengths: Any, cache: Any
) -> None:
    """Refuse ids [B, S], lengths [B] and a cache that do not fit each other, or the session.

    What is on a GPU is not read.

    Raises:
        MoecError: the message says which of them, and what would fit.
    """
    if not isinstance(cache, Cache):
        _refuse("cache", type(cache).__name__, "a cache of Session.prefill or Session.new_cache")
    rows = len(cache.lengths)
    wanted = f"integers [{rows}, S], a row for each sequence of the cache"
    if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS or ids.dim() != 2:
        _refuse("input_ids", _kind(ids), wanted)
    if len(ids) != rows or not ids.shape[1]:
        _refuse("input_ids", _kind(ids), wanted)
    good = isinstance(lengths, Tensor) and lengths.dtype in _INTEGERS and lengths.shape == (rows,)
    if not good or bool((lengths < 0).any() | (lengths > ids.shape[1]).any()):
        found = str(lengths.tolist())[:200] if good else _kind(lengths)
        _refuse("lengths", found, f"integers [{rows}] from 0 to {ids.shape[1]}")
    first = spec.text.all_layers[0]
    count = spec.text.layers * len(first.caches)
    shape = layer_shape(first.caches[0], rows, cache.capacity, layout)
    mine = cache.tensors.get(names.past(first.index, first.caches[0].kind))
    kind = cache_dtype(spec, precision)
    fits = mine is not None and mine.dtype == kind and _holds(tuple(mine.shape), shape)
    if not fits or len(cache.tensors) != count:
        found = "no such tensor" if mine is None else _kind(mine)
        expected = f"{count} tensors, the first {kind} {list(shape)}: a cache of this session"
        _refuse("cache", f"{len(cache.tensors)} tensors, the first {found}", expected)


def _holds(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the shapes agree, but for more slots, which growing leaves where it failed."""
    others = [each[:-2] + each[-1:] for each in (found, wanted)]
    return len(found) == len(wanted) and others[0] == others[1] and found[-2] >= wanted[-2]


def _kind(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"{given.dtype} {list(given.shape)}"
    return f"{type(given).__name__} {str(given)[:40]}"


def _refuse(where: str, found: str, expected: str) -> NoReturn:
    refuse(where, found, expected, "correct the call; Session.prefill makes a cache that fits")
