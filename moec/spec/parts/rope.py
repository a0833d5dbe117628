"""How RoPE's frequencies are scaled for positions beyond those of the training."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moec.spec.data import Frozen
from moec.spec.parts.sizes import Factor, Positions


class RopeScaling(Frozen):
    """The parameters of Llama 3's RoPE frequency scaling, by bands of wavelengths.

    `moec.graph_builder.ops.rope.inverse_frequencies` gives the formula. `low` and `high` are
    `low_freq_factor` and `high_freq_factor` of `config.json`; `original_positions` is in tokens.
    """

    kind: Literal["bands"] = "bands"
    factor: Factor
    low: Factor
    high: Factor
    original_positions: Positions

    @property
    def numbers(self) -> list[float]:
        """The numbers of the formula, in its order."""
        return [self.factor, self.low, self.high, float(self.original_positions)]

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    @property
    def score_factor(self) -> float:
        """What attention scores are multiplied by."""
        return 1.0


class Yarn(Frozen):
    """The parameters of YaRN (https://arxiv.org/abs/2309.00071).

    Frequencies that turn more than `fast` times within `original_positions` tokens stay, those that
    turn less than `slow` times are divided by `factor`, and those between are blended; `truncate`
    rounds the bounds of the blend to whole pairs. `mscale`, `mscale_all_dim` and `attention_factor`
    are those of `config.json`; with `scales_scores`, mscale_all_dim acts on attention scores too.
    """

    kind: Literal["yarn"] = "yarn"
    factor: Factor
    original_positions: Positions
    fast: Factor = 32.0
    slow: Factor = 1.0
    truncate: bool = True
    mscale: Factor | None = None
    mscale_all_dim: Factor | None = None
    attention_factor: Factor | None = None
    scales_scores: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fast < self.slow:
            raise ValueError(f"fast {self.fast} is below slow {self.slow}")
        return self

    @property
    def numbers(self) -> list[float]:
        """The numbers of the formula, in its order."""
        positions = float(self.original_positions)
        return [self.factor, positions, self.fast, self.slow, float(self.truncate)]

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._sharpness(self.mscale) / self._sharpness(self.mscale_all_dim)
        return self._sharpness(1.0)

    @property
    def score_factor(self) -> float:
        """What attention scores are multiplied by."""
        if not (self.scales_scores and self.mscale_all_dim):
            return 1.0
        return self._sharpness(self.mscale_all_dim) ** 2

    def _sharpness(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0


Scaling = Annotated[RopeScaling | Yarn, Field(union_mode="left_to_right")]
