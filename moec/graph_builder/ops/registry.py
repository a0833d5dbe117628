"""How an op is declared: its schema, its eager function and its shape rule.

The eager function defines what the op computes. It is the reference that every lowering is checked
against. The shape rule checks the types of the operands and gives the type of the result. It serves
the builder, eager runs and torch's fake tensors, so its sizes are ints, symbols or SymInts. An op
with many operands has one record for them (`operands`): its eager function, its rule and its
lowerings take that record.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any

import torch

from moec.graph_builder.types import TensorType
from moec.spec.errors import refuse

_LIBRARY = torch.library.Library("moec", "DEF")
OPS: dict[str, "Op"] = {}

Types = TensorType | tuple[TensorType, ...]
Rule = Callable[..., Types]


class Op:
    """One op of the vocabulary; `target` is what fx nodes call.

    `eager` and `rule` take the arguments of the schema, in order.
    """

    def __init__(
        self, schema: str, eager: Callable[..., Any], rule: Rule, operands: type[Any] | None
    ) -> None:
        self.name, self.operands = schema.split("(", 1)[0], operands
        self.eager: Callable[..., Any] = wraps(eager)(lambda *args: eager(*self.given(args)))
        self.rule: Rule = wraps(rule)(lambda *args: rule(*self.given(args)))
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"moec::{self.name}", self._fake, lib=_LIBRARY)
        self.target = getattr(torch.ops.moec, self.name).default
        if operands:
            names = [argument.name for argument in self.target._schema.arguments]
            assert names == [field.name for field in fields(operands)], self.name
        OPS[self.name] = self

    def given(self, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments of the schema as functions of this op take them: as its record, if any."""
        return (self.operands(*args),) if self.operands else args

    def _run(self, *args: Any) -> Any:
        self.rule(*map(_type_of, args))
        return self.eager(*args)

    def _fake(self, *args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        types = self.rule(*map(_type_of, args))

        def empty(of: TensorType) -> torch.Tensor:
            return torch.empty(of.shape, dtype=of.dtype, device=device)

        return empty(types) if isinstance(types, TensorType) else tuple(map(empty, types))


def op(
    schema: str, rule: Rule, operands: type[Any] | None = None
) -> Callable[[Callable[..., Any]], Op]:
    """Declare the decorated eager function as op `moec::<schema>` with the given shape rule.

    With `operands`, a record whose fields are the schema's arguments, both functions take that.
    """
    return lambda eager: Op(schema, eager, rule, operands)


def implement(name: str, function: Callable[..., Any], device: str) -> None:
    """Let `function` compute op `name` on `device`, such as "cuda", instead of the eager function.

    The operands are not checked there any more. Call this once for each op and device.
    """
    _LIBRARY.impl(name, function, device)


def need(holds: bool, op_name: str, operand: str, found: object, expected: object) -> None:
    """Refuse an operand: raise a `MoecError` that names op and operand unless `holds`."""
    if not holds:
        refuse(
            f"op moec::{op_name}, operand {operand}", found, expected, "correct the graph's builder"
        )


def _type_of(arg: Any) -> Any:
    if isinstance(arg, list):
        return list(map(_type_of, arg))
    return TensorType(tuple(arg.shape), arg.dtype) if isinstance(arg, torch.Tensor) else arg
