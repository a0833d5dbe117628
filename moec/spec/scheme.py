"""Quantisation schemes, FP8 (E4M3) or 4-bit integers of a checkpoint, as data.

A scheme says which weights are quantised, how many values share a scale, and what happens to the
inputs. A quantised weight is stored as one-byte quantised values and as scales; the weight is
quantised value times scale. A linear layer's input either stays as it is, or is rounded to E4M3
too. Its scale is then static (calibrated and stored) or dynamic (computed from the largest element
of each token). Weights that no scheme rule names stay in their stored type.

moec itself quantises to FP8 with a scheme. Schemes of 4-bit integers describe checkpoints that are
quantised already: an integer of 0 to 15, less its zero point, times the scale of its group.
"""

from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moec.spec import names
from moec.spec.bounded import limits
from moec.spec.data import DType, Frozen

#: the largest E4M3 number; larger values saturate
LARGEST = 448.0

#: what a scheme rule may say of a weight's scales, and what it means
WEIGHTS = {
    "tensor": "one scale for the whole tensor, with all experts of a layer",
    "expert": "one scale for each expert, or for each linear layer",
    "channel": "per-channel: one scale for each output",
    "block": "block-wise: one scale for each square of `block` inputs by `block` outputs",
}
#: the same for weights of 4-bit integers
INT4_WEIGHTS = {
    "group": "one scale for each `block` inputs of an output",
    "output": "one scale for each output",
}
#: what a scheme rule may say of the inputs, and what it means
INPUTS = {
    "none": "inputs are not quantised",
    "tensor": "static: one calibrated scale",
    "expert": "static: one calibrated scale for each expert, or for each linear layer",
    "token": "dynamic, per-token: one scale for each token",
    "group": "dynamic: one scale for each `block` elements of a token",
}
STATIC = ("tensor", "expert")

#: the format whose tensor names and shapes a checkpoint uses; "moec" is an artefact's own format
Layout = Literal["moec", "compressed-tensors", "modelopt", "fbgemm_fp8", "fp8", "pack-quantized"]
#: the layout of 4-bit integers; the others are FP8
INT4: Layout = "pack-quantized"

#: patterns over parameter names, for the groups of weights that schemes name
EXPERTS = names.routed("*")
SHARED = (names.shared("*", "*", "weight"),)
DENSE = tuple(names.dense("*", part, "weight") for part in ("gate", "up", "down"))
ATTENTION = tuple(names.attention("*", f"{part}*", "weight") for part in "qkvo")


@lru_cache(maxsize=64)
def _sorted(patterns: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """The patterns that are names of weights, and those with wildcards."""
    wild = tuple(each for each in patterns if set("*?[") & set(each))
    return frozenset(patterns) - frozenset(wild), wild


class Rule(Frozen):
    """A scheme rule: how to quantise the parameters whose names match one of the patterns `of`.

    In a pattern, "*" stands for any characters.
    """

    of: tuple[Annotated[str, Field(max_length=limits.PATTERN)], ...] = Field(min_length=1)
    weight: Literal["tensor", "expert", "channel", "block", "group", "output"] = Field(
        description=str(WEIGHTS | INT4_WEIGHTS)
    )
    inputs: Literal["none", "tensor", "expert", "token", "group"] = Field(
        default="none", description=str(INPUTS)
    )

    def matches(self, parameter: str) -> bool:
        """Whether this scheme rule applies to `parameter`."""
        plain, wild = _sorted(self.of)
        return parameter in plain or any(fnmatchcase(parameter, pattern) for pattern in wild)

    @property
    def wild(self) -> tuple[str, ...]:
        """The patterns that are more than a name."""
        return _sorted(self.of)[1]


class Scheme(Frozen):
    """A scheme: an ordered list of scheme rules. The first one that matches a weight applies.

    No built-in scheme quantises routers, norms or the embedding. With `cache`, keys and values are
    stored in E4M3 too, with one calibrated scale for the keys of a layer and one for the values.
    With `zero_points`, 4-bit integers have a zero point for each scale; otherwise it is 8.
    """

    name: str = Field(min_length=1, max_length=limits.NAME)
    rules: tuple[Rule, ...] = Field(min_length=1, max_length=limits.RULES)
    block: int = Field(default=128, ge=2, le=1024)
    bound: float | None = Field(
        default=None, gt=0, description="dynamic scales treat larger input magnitudes as this one"
    )
    cache: bool = False
    zero_points: bool = False
    layout: Layout = "moec"
    scales: DType = Field(default="fp32", description="type of the scales on disk")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (wild := sum(len(rule.wild) for rule in self.rules)) > limits.WILDCARDS:
            raise ValueError(
                f"{wild} patterns with wildcards: at most {limits.WILDCARDS} are expected, "
                "and any number of plain names"
            )
        if any((rule.weight in INT4_WEIGHTS) != self.int4 for rule in self.rules):
            raise ValueError(f"weight group or output goes with layout {INT4}, and with no other")
        if self.int4 and (self.cache or any(rule.inputs != "none" for rule in self.rules)):
            raise ValueError(f"layout {INT4} has no scales for inputs or caches")
        if self.zero_points and not self.int4:
            raise ValueError(f"only layout {INT4} has zero points")
        return self

    def rule(self, parameter: str) -> Rule | None:
        """The scheme rule that applies to `parameter`, or None if it is not quantised."""
        return next((rule for rule in self.rules if rule.matches(parameter)), None)

    @property
    def static(self) -> bool:
        """Whether the scheme has static scales, which need calibration."""
        return self.cache or any(rule.inputs in STATIC for rule in self.rules)

    @property
    def int4(self) -> bool:
        """Whether the quantised values are 4-bit integers, and not FP8."""
        return self.layout == INT4

    @property
    def precision(self) -> str:
        """The precision of an artefact of such weights: "fp8" or "int4"."""
        return "int4" if self.int4 else "fp8"

    @property
    def shown(self) -> str:
        """What a message calls the weights of this scheme."""
        return f"{self.precision.upper()} weights ({self.name})"

    @property
    def separate_experts(self) -> bool:
        """Whether each expert has its own tensors, [out, in], instead of a slice of a stack."""
        return self.layout in ("compressed-tensors", "fp8", INT4)


def _scheme(name: str, of: tuple[str, ...], weight: str, inputs: str, **more: object) -> Scheme:
    rules = [{"of": of, "weight": weight, "inputs": inputs}]
    return Scheme.model_validate({"name": name, "rules": rules, **more})


_LINEAR = EXPERTS + SHARED + DENSE + ATTENTION

#: for TensorRT, where only the plugin that computes the experts supports dynamic scales
MIXED = Scheme(
    name="mixed",
    rules=(
        Rule(of=EXPERTS + SHARED, weight="channel", inputs="token"),
        Rule(of=DENSE + ATTENTION, weight="channel", inputs="tensor"),
    ),
)
#: "dynamic" quantises all linear layers as Meta's "meta" quantises experts; "static" does the same
#: with calibrated input scales
SCHEMES = {
    each.name: each
    for each in (
        #       name        what     weights    inputs
        _scheme("meta", EXPERTS, "channel", "token"),
        _scheme("dynamic", _LINEAR, "channel", "token"),
        _scheme("static", _LINEAR, "channel", "tensor"),
        MIXED,
        _scheme("modelopt", _LINEAR, "tensor", "tensor", cache=True),
        _scheme("deepseek", _LINEAR, "block", "group"),
    )
}
#: what `quantize` is for: 4-bit integers, which no build makes and every build reads
W4A16 = _scheme("w4a16", _LINEAR, "group", "none", layout=INT4)
#: one static scale for the inputs of all experts, because vLLM has no other
PER_TENSOR = _scheme("per-tensor", _LINEAR, "expert", "tensor")
NAMED = SCHEMES | {each.name: each for each in (PER_TENSOR, W4A16)}
#: a target's default scheme -> what takes its place for a model without experts
WITHOUT_EXPERTS = {"meta": "dynamic", "mixed": "static"}
