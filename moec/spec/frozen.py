"""What all declarative data has in common."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

DType = Literal["fp32", "fp16", "bf16"]


class Frozen(BaseModel):
    """Base of every spec: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
