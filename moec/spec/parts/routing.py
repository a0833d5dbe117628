"""The experts of a layer, and how a router chooses and weighs them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from moec.spec.data import Frozen
from moec.spec.parts.sizes import ExpertCount, Factor, Width

#: what a router makes of a token's logits, one for each expert
SCORES = {
    "sigmoid": "the sigmoid of each logit",
    "softmax": "the softmax over all experts",
    "softmax_of_chosen": "the softmax over the chosen experts",
}
#: what decides which experts are chosen: the `top_k` largest
CHOICES = {"logits": "the logits", "scores": "the scores, plus the router's bias if it has one"}
#: what a score multiplies
WEIGHED = {"input": "the expert's input", "output": "the expert's output"}


class Routing(Frozen):
    """How a router's logits choose experts, and with which weight each of them counts.

    The weight of a chosen expert is its score; with `normalise` divided by the sum of the chosen
    ones' scores; times `factor`. With `groups` above 1 the experts are in that many groups of one
    size, and only those in the `kept_groups` best groups can be chosen: a group is as good as the
    sum of its two best values of `choice`. A `bias` is added for the choice alone.
    """

    score: Literal["sigmoid", "softmax", "softmax_of_chosen"] = Field(
        default="sigmoid", description=str(SCORES)
    )
    choice: Literal["logits", "scores"] = Field(default="logits", description=str(CHOICES))
    bias: bool = False
    groups: ExpertCount = 1
    kept_groups: ExpertCount = 1
    normalise: bool = False
    factor: Factor = 1.0
    weighed: Literal["input", "output"] = Field(default="input", description=str(WEIGHED))

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.score == "softmax_of_chosen" and self.choice == "scores":
            raise ValueError("softmax_of_chosen is known after the choice: choose by logits")
        if self.bias and self.choice == "logits":
            raise ValueError("a bias is added to scores: choose by scores")
        if self.kept_groups > self.groups:
            raise ValueError(
                f"kept_groups {self.kept_groups} is more than the {self.groups} groups"
            )
        return self


class Experts(Frozen):
    """The experts of one MoE layer.

    Each token goes through `top_k` of `count` routed SwiGLU experts, and through the shared expert
    if there is one. Several shared experts are one that is as wide as all of them.
    """

    count: ExpertCount
    top_k: ExpertCount
    hidden: Width = Field(description="width of each routed expert")
    shared_hidden: Width | None = Field(
        default=None, description="width of all shared experts together; null where there is none"
    )
    routing: Routing = Routing()

    @model_validator(mode="after")
    def _check(self) -> Self:
        groups, kept = self.routing.groups, self.routing.kept_groups
        if self.top_k > self.count:
            raise ValueError(f"top_k {self.top_k} is more than the {self.count} experts")
        if self.count % groups:
            raise ValueError(f"{self.count} experts are not in {groups} groups of one size")
        size = self.count // groups
        if groups > 1 and size < 2:
            raise ValueError("a group has at least two experts, whose values are added")
        if self.top_k > size * kept:
            raise ValueError(
                f"top_k {self.top_k} is more than the {size * kept} experts of {kept} groups"
            )
        return self
