"""The arguments of op `route`."""

from typing import Any

from torch import Tensor

from moec.spec.parts.routing import Routing


def by(logits: Any, top_k: int, ranks: Tensor | None = None, **routing: Any) -> tuple[Any, ...]:
    """Choose `top_k` experts by `ranks`, by default the logits, and weigh as `routing` says."""
    how = Routing(**routing)
    order = logits if ranks is None else ranks
    return logits, order, top_k, how.score, how.normalise, how.factor
