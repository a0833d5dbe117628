"""The types of a spec's numbers, each with the largest value that any model is expected to have."""

from typing import Annotated

from pydantic import Field

from moec.spec.bounded import limits

Width = Annotated[int, Field(gt=0, le=limits.WIDTH)]
Positions = Annotated[int, Field(gt=0, le=limits.POSITIONS)]
Depth = Annotated[int, Field(gt=0, le=limits.LAYERS)]
Heads = Annotated[int, Field(gt=0, le=limits.HEADS)]
HeadDim = Annotated[int, Field(gt=0, le=limits.HEAD_DIM)]
ExpertCount = Annotated[int, Field(gt=0, le=limits.EXPERTS)]
#: what a norm adds to the mean square
Epsilon = Annotated[float, Field(ge=1e-30, le=1)]
#: a base of RoPE; angles that a tiny one makes are beyond float32
Base = Annotated[float, Field(ge=1e-6, le=1e15)]
#: a factor of RoPE scaling, of router scores or of the attention temperature
Factor = Annotated[float, Field(ge=1e-6, le=1e6)]
TokenId = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=limits.NAME)]
