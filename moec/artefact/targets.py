"""What a target is, as one record; and the records that there are.

Each target is a folder of `moec/targets`: its `__init__.py` holds the record as `TARGET`, and the
files beside it hold what is the target's own. `targets` finds the folders, so that a new target is
a new folder and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from moec.spec.errors import refuse


@dataclass(frozen=True, slots=True)
class Precision:
    """What a target does in one precision.

    Attributes:
        stays: the dialect of graphs whose weights keep the bytes of the checkpoint; None: there is
            none.
        packed: the dialect of graphs whose weights are rewritten; None: there is none.
        compute: what the graph computes in: "fp32", "fp16" or "bf16".
    """

    stays: str | None
    packed: str | None
    compute: str


@dataclass(frozen=True, slots=True)
class Target:
    """All that moec knows of a target. `moec/targets` has one record for each.

    Places of code are written "module:name" and imported when they are used, so that a machine
    needs only the packages of the targets that it uses.

    Attributes:
        name: what users call it.
        precisions: what it does in each precision; the first is the default of a build.
        builder: the place of its `moec.exporters.builder.Builder`: what it refuses, how a build
            makes its files, how `bind` reads them again.
        engines: name of an engine that runs its artefacts -> the place of that engine's
            `moec.runtime.engines.engine.Engine`; the first is the default of a session.
        proof: the engine that a proof runs; "" is the first.
        suffix: how the names of its graphs' files end.
        scheme: the FP8 scheme of wide weights where a user names none.
        reduced: dialect -> the least sizes of the reduced-size model that proves it, as arguments
            of `moec.spec.reduced`, where kernels want more than that model has.
    """

    name: str
    precisions: Mapping[str, Precision]
    builder: str
    engines: Mapping[str, str]
    proof: str = ""
    suffix: str = ".onnx"
    scheme: str = "meta"
    reduced: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        """The engine that a session opens where nobody chooses."""
        return next(iter(self.engines))

    def compute(self, precision: str) -> str:
        """What a graph of `precision` computes in: "fp32", "fp16" or "bf16"."""
        known = self.precisions.get(precision)
        return known.compute if known else precision


@cache
def targets() -> dict[str, Target]:
    """Every target by name."""
    folders = import_module("moec.targets")
    names = [each.name for each in iter_modules(folders.__path__) if each.ispkg]
    rows: list[Target] = [import_module(f"{folders.__name__}.{name}").TARGET for name in names]
    return {row.name: row for row in rows}


def find_target(
    name: str, where: object | None = None, next_step: str = "use --target onnx"
) -> Target:
    """The record of target `name`.

    Raises:
        MoecError: no such target; `where` and `next_step` are the message's.
    """
    known = targets()
    if name not in known:
        refuse(
            where or f"--target {name}", f"no such target: {name}", " or ".join(known), next_step
        )
    return known[name]


def imported(place: str) -> Any:
    """What "module:name" names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
