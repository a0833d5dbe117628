"""The base class of all declarative data."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

DType = Literal["fp32", "fp16", "bf16"]


class Frozen(BaseModel):
    """Base of every spec: immutable. Unknown fields and infinite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
