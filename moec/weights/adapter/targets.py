"""Which modules peft adapts: a tensor of any other it leaves aside, although it is in the file.

moec merges all tensors of a file. So it refuses a file that has more than peft would use.
"""

import re
from dataclasses import dataclass
from typing import Self

from moec.spec.fields import Fields, shown

_NUMBERS = re.compile(r"\.(\d+)(?=\.)")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Targets:
    """What `adapter_config.json` says of the modules that it is for.

    Attributes:
        at: the fields, for messages.
        modules: ends of names; None: any module, because it is an expression or not given.
        excluded: ends of names of modules that are left aside.
        layers: numbers of layers; None: all.
        parameters: the parameters that are adapted besides, whatever their modules are called.
    """

    at: Fields
    modules: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: frozenset[int] | None
    parameters: tuple[str, ...]

    @classmethod
    def read(cls, at: Fields, parameters: list[str]) -> Self:
        """Take the fields from `at`.

        Raises:
            MoecError: a field is of another kind, or an expression that excludes modules.
        """
        modules = at.take("target_modules", list, str, default=None)
        excluded = at.take("exclude_modules", list, str, default=[]) or []
        if isinstance(excluded, str):
            raise at.error("exclude_modules", shown(excluded), "a list of names")
        layers = at.take("layers_to_transform", list, int, default=None)
        if (pattern := at.take("layers_pattern", str, list, default=None)) not in (
            None,
            "layers",
            [],
            ["layers"],
        ):
            raise at.error("layers_pattern", shown(pattern), "'layers', or none")
        return cls(
            at,
            tuple(modules) if isinstance(modules, list) else None,
            tuple(excluded),
            None if layers is None else frozenset([layers] if isinstance(layers, int) else layers),
            tuple(parameters),
        )

    def check(self, module: str) -> None:
        """Refuse a module, by peft's name, that peft would leave aside.

        Raises:
            MoecError: names the field that leaves it aside.
        """
        if _ends(module, self.excluded):
            raise self._left_aside("exclude_modules", module)
        of_parameter = any(_ends(module, (each.rpartition(".")[0],)) for each in self.parameters)
        if self.modules is not None and not of_parameter and not _ends(module, self.modules):
            raise self._left_aside("target_modules", module)
        if self.layers is None:
            return
        layer, numbers = _LAYER.search(module), _NUMBERS.findall(f"{module}.")
        if not layer or len(numbers) > 1 or int(layer[1]) not in self.layers:
            raise self._left_aside("layers_to_transform", module)

    def _left_aside(self, field: str, module: str) -> Exception:
        return self.at.error(
            field,
            f"a field for which peft leaves {module[:200]} aside, whose tensors are there",
            "tensors of the modules that it adapts, and no others",
        )


def _ends(module: str, names: tuple[str, ...]) -> bool:
    return any(module == each or module.endswith(f".{each}") for each in names if each)
