"""Which modules peft adapts: a tensor of any other it leaves aside, although it is in the file.

moec merges all tensors of a file. So it refuses a file with a tensor that a list of names leaves
aside. Where `target_modules` is an expression, moec takes the word of the file: peft saves what it
has adapted.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from moec.spec.fields import Fields, shown

#: the first number in a module's name is that of its layer, as peft takes it
_LAYER = re.compile(r"^.*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Targets:
    """What `adapter_config.json` says of the modules that it is for.

    Attributes:
        at: the fields, for messages.
        modules: ends of names; None: any module, because it is an expression or not given.
        excluded: ends of names of modules that are left aside.
        layers: numbers of layers; None: all.
        holders: ends of names of modules whose parameters are adapted besides.
    """

    at: Fields
    modules: frozenset[str] | None
    excluded: frozenset[str]
    layers: frozenset[int] | None
    holders: frozenset[str]

    @classmethod
    def read(cls, at: Fields, parameters: list[Any]) -> Self:
        """Take the fields from `at`; `parameters` is its `target_parameters`.

        Raises:
            MoecError: a field is of another kind, or an expression that excludes modules.
        """
        modules = at.take("target_modules", list, str, default=None)
        excluded = at.take("exclude_modules", list, str, default=[]) or []
        if isinstance(excluded, str):
            raise at.error("exclude_modules", shown(excluded), "a list of names")
        layers = at.take("layers_to_transform", list, int, default=None)
        layers = [layers] if isinstance(layers, int) else layers or None
        pattern = at.take("layers_pattern", str, list, default=None)
        if pattern not in (None, "layers", [], ["layers"]):
            raise at.error("layers_pattern", shown(pattern), "'layers', or none")
        for field, values, kind in (
            ("target_modules", modules, str),
            ("exclude_modules", excluded, str),
            ("layers_to_transform", layers, int),
            ("target_parameters", parameters, str),
        ):
            odd = [each for each in values or () if type(each) is not kind]
            if odd and not isinstance(values, str):
                what = "names" if kind is str else "whole numbers"
                raise at.error(field, shown(odd[0]), f"a list of {what}")
        return cls(
            at,
            frozenset(modules) if isinstance(modules, list) else None,
            frozenset(excluded),
            None if layers is None else frozenset(layers),
            frozenset(each.rpartition(".")[0] for each in parameters),
        )

    def check(self, module: str) -> None:
        """Refuse a module, by peft's name, that peft would leave aside.

        Raises:
            MoecError: names the field that leaves it aside.
        """
        ends = set(_ends(module))
        if ends & self.excluded:
            raise self._left_aside("exclude_modules", module)
        if self.modules is not None and not ends & self.modules | ends & self.holders:
            raise self._left_aside("target_modules", module)
        layer = _LAYER.match(module)
        if self.layers is not None and (not layer or int(layer[1]) not in self.layers):
            raise self._left_aside("layers_to_transform", module)

    def _left_aside(self, field: str, module: str) -> Exception:
        return self.at.error(
            field,
            f"a field for which peft leaves {module[:200]} aside, whose tensors are there",
            "tensors of the modules that it adapts, and no others",
        )


def _ends(module: str) -> Iterator[str]:
    """A module's name, and what follows each of its dots."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module
