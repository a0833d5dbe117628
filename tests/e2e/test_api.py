"""The public API: what it has, what it returns, and which arguments go by position."""

import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moec

#: a function or method -> what it takes by position; all else is keyword-only
POSITIONAL = {
    "bench": "path",
    "bind": "artefact checkpoint out",
    "build_engines": "artefact",
    "build_library": "artefact out architectures",
    "build_graph": "spec precision",
    "calibrate": "checkpoint tokens",
    "encode": "path text images",
    "export": "source target precision out",
    "load_spec": "source",
    "open_session": "path device",
    "plan": "spec precision",
    "quantize": "checkpoint scheme out",
    "trtexec_commands": "artefact",
    "validate": "path",
    "Session.logits": "self input_ids pixel_values",
    "Session.generate": "self input_ids pixel_values max_new_tokens",
    "Session.prefill": "self input_ids pixel_values",
}


def _public() -> dict[str, Any]:
    return {name: getattr(moec, name) for name in moec.__all__}


def _functions() -> Iterator[tuple[str, Callable[..., object]]]:
    """Every public function, and every public method and property of a public class."""
    for name, each in _public().items():
        if not inspect.isclass(each):
            yield name, inspect.unwrap(each)
            continue
        for key, method in vars(each).items():
            found = method.fget if isinstance(method, property) else method
            if inspect.isfunction(found) and not key.startswith("_"):
                yield f"{name}.{key}", found


def test_every_public_name_is_there_and_listed() -> None:
    assert moec.__all__ == sorted(moec.__all__) and set(moec.__all__) == set(moec._HOMES)
    assert set(moec.__all__) <= set(dir(moec))
    assert all(each.__doc__ for each in _public().values())
    with pytest.raises(AttributeError, match="herd"):
        _ = moec.herd


def _parts(hint: Any) -> Iterator[Any]:
    """A type and those inside it, but for the shape and dtype of an array."""
    yield hint
    if typing.get_origin(hint) is not np.ndarray:
        for inner in typing.get_args(hint):
            yield from _parts(inner)


def test_nothing_public_returns_any() -> None:
    found = dict(_functions())
    assert {"export", "Session.logits", "Report.to_dict", "Artefact.entries"} <= set(found)
    for name, function in found.items():
        hints = typing.get_type_hints(function)
        assert "return" in hints, name
        assert not any(part is Any for part in _parts(hints["return"])), name


def test_what_goes_by_position() -> None:
    functions = dict(_functions())
    found = {
        name: " ".join(
            parameter.name
            for parameter in inspect.signature(functions[name]).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        )
        for name in POSITIONAL
    }
    assert found == POSITIONAL
    assert {name for name, each in _public().items() if not inspect.isclass(each)} <= set(found)


def test_results_are_of_the_kind_that_was_given(built: Path) -> None:
    session = moec.open_session(built)
    ids = [[1, 2, 3]]
    for given, kind in (
        (torch.tensor(ids), torch.Tensor),
        (np.array(ids), np.ndarray),
        (ids, np.ndarray),
    ):
        logits, tokens = session.logits(given), session.generate(given, max_new_tokens=2)
        assert isinstance(logits, kind) and isinstance(tokens, kind)
        assert str(logits.dtype).endswith("float32") and str(tokens.dtype).endswith("int64")


@pytest.mark.parametrize("method", ["logits", "generate"])
def test_a_type_checker_knows_the_kind(method: str) -> None:
    hints = map(typing.get_type_hints, typing.get_overloads(getattr(moec.Session, method)))
    tensor, array = ((each["input_ids"], each["return"]) for each in hints)
    assert tensor == (torch.Tensor, torch.Tensor)
    assert torch.Tensor not in typing.get_args(array[0])
    assert typing.get_origin(array[1]) is np.ndarray
