"""How a model is quantised to FP8 (E4M3), as data: which weights, how finely, and what of inputs.

A weight is stored as codes of one byte and scales: the weight is code times scale. The input of its
product is rounded to the same grid, with a static scale (calibrated, stored) or a dynamic one (of
each token's largest element), or stays as it is. What no rule names stays as it was stored.
"""

from fnmatch import fnmatchcase
from typing import Literal, Self

from pydantic import Field, model_validator

from moec.spec.frozen import DType, Frozen

#: the largest number of E4M3; what is beyond saturates
LARGEST = 448.0

#: what shares a scale -> in words
WEIGHTS = {
    "tensor": "one scale a tensor, all experts of a layer together",
    "expert": "one scale for each expert, or linear layer",
    "channel": "one scale for each output",
    "block": "one scale for each square of `block` inputs by `block` outputs",
}
INPUTS = {
    "none": "inputs stay as they are",
    "tensor": "static: one calibrated scale",
    "expert": "static: one calibrated scale for each expert, or linear layer",
    "token": "dynamic: one scale for each token",
    "group": "dynamic: one scale for each `block` elements of a token",
}
STATIC = ("tensor", "expert")

#: whose names and shapes a checkpoint uses; "moec": none, an artefact's own
Layout = Literal["moec", "compressed-tensors", "modelopt", "fbgemm_fp8"]

#: patterns over parameter names, for the groups that schemes speak of
EXPERTS = ("layers.*.moe.gate_up", "layers.*.moe.down")
SHARED = ("layers.*.moe.shared.*.weight",)
DENSE = tuple(f"layers.*.ffn.{part}.weight" for part in ("gate", "up", "down"))
ATTENTION = tuple(f"layers.*.attn.{part}.weight" for part in "qkvo")


class Rule(Frozen):
    """Parameters whose names match one of the patterns `of`; "*" stands for any characters."""

    of: tuple[str, ...] = Field(min_length=1)
    weight: Literal["tensor", "expert", "channel", "block"] = Field(description=str(WEIGHTS))
    inputs: Literal["none", "tensor", "expert", "token", "group"] = Field(
        default="none", description=str(INPUTS)
    )

    def matches(self, parameter: str) -> bool:
        """Whether the rule is for `parameter`."""
        return any(fnmatchcase(parameter, pattern) for pattern in self.of)


class Scheme(Frozen):
    """The first rule that matches a parameter holds. Routers, norms, embedding: never by default.

    `cache` stores keys and values in E4M3 too, with one calibrated scale a layer for each.
    """

    name: str = Field(min_length=1)
    rules: tuple[Rule, ...] = Field(min_length=1)
    block: int = Field(default=128, ge=2, le=1024)
    bound: float | None = Field(default=None, gt=0, description="dynamic scales look no further")
    cache: bool = False
    layout: Layout = "moec"
    scales: DType = Field(default="fp32", description="of the scales on disk")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layout == "compressed-tensors" and any(r.inputs in STATIC for r in self.rules):
            raise ValueError("compressed-tensors with static input scales is not supported")
        return self

    def rule(self, parameter: str) -> Rule | None:
        """The rule that holds for `parameter`; None where it stays wide."""
        return next((rule for rule in self.rules if rule.matches(parameter)), None)

    @property
    def static(self) -> bool:
        """Whether anything needs calibration."""
        return self.cache or any(rule.inputs in STATIC for rule in self.rules)

    @property
    def separate_experts(self) -> bool:
        """Whether each expert has tensors of its own, [out, in], instead of a slice of fused."""
        return self.layout == "compressed-tensors"


def _scheme(name: str, of: tuple[str, ...], weight: str, inputs: str, **more: object) -> Scheme:
    rules = [{"of": of, "weight": weight, "inputs": inputs}]
    return Scheme.model_validate({"name": name, "rules": rules, **more})


_LINEAR = EXPERTS + SHARED + DENSE + ATTENTION

#: for engines that know dynamic scales inside a plugin for experts alone
MIXED = Scheme(
    name="mixed",
    rules=(
        Rule(of=EXPERTS + SHARED, weight="channel", inputs="token"),
        Rule(of=DENSE + ATTENTION, weight="channel", inputs="tensor"),
    ),
)
#: "dynamic" and "static" are ours: what `meta` does for all linear layers, and the same with scales
#: that are known before anything runs
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
