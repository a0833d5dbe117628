"""A fault: what it does to which file of an artefact, and where a proof should find it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Fault:
    """A mistake in one file of an artefact.

    Attributes:
        name: the mistake, in words.
        kind: what it is a mistake in, such as "norm" or "rope".
        plant: makes the mistake. It gets the ONNX model, or for weights the folder, and `layer`.
        layer: the layer that is wrong; None: not in a layer, or in all of one kind.
        at: the names of the values of which a proof may say that they are the first wrong ones,
            separated by blanks. Those of the layer are without the layer: "attn.q.rope".
        file: the file of the artefact that has the mistake; "" for weights.
    """

    name: str
    kind: str
    plant: Callable[[Any, Any], None]
    layer: int | None
    at: str
    file: str = "model.onnx"

    def in_layer(self, layer: int) -> "Fault":
        """The same fault in another layer."""
        return replace(self, layer=layer)

    @property
    def where(self) -> str:
        """The layer in words."""
        return "-" if self.layer is None else str(self.layer)

    @property
    def accepted(self) -> set[tuple[int | None, str]]:
        """The layer and the op of each value that may be named; op "attn.q.rope" of layer 3."""
        found = {split(name) for name in self.at.split()}
        return {(self.layer if layer is None else layer, op) for layer, op in found}


def split(name: str) -> tuple[int | None, str]:
    """The layer and the op in the name of a value, as the graph or a report has it.

    "layers.3.attn.q.rope" and "layer 3: attn.q.rope" are (3, "attn.q.rope"); "ring.mask" has no
    layer. The layers of the vision tower and of the caches keep their first word:
    "vision.layers.1.attn.o" is (1, "vision.attn.o"), "present.0.key" is (0, "present.key"). The
    weight of expert 4, "weights, layers.2: moe.down[4]", is (2, "moe.down").
    """
    words = re.sub(r"\[\d+\]|^weights[,:]|[:,./]", " ", name).split()
    numbers = [i for i, word in enumerate(words) if word.isdigit() and _counts_layers(words, i)]
    if not numbers:
        return None, ".".join(words)
    at = numbers[0]
    rest = [word for i, word in enumerate(words) if i != at and word not in ("layer", "layers")]
    return int(words[at]), ".".join(rest)


def _counts_layers(words: list[str], at: int) -> bool:
    return at > 0 and words[at - 1] in ("layer", "layers", "present", "past")


def right_layer(fault: Fault, divergence: str) -> bool:
    """Whether `divergence`, the name of the first check that failed, names the layer."""
    return split(divergence)[0] in {layer for layer, _ in fault.accepted}


def right_op(fault: Fault, divergence: str) -> bool:
    """Whether `divergence` names the layer and an op, or a value inside this op."""
    layer, found = split(divergence)
    return any(
        layer == theirs and (found == op or found.startswith(f"{op}."))
        for theirs, op in fault.accepted
    )
