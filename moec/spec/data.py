"""What all declarative data is made of: the base class of its records, and dtypes by their names.

Every library and format has its own names for dtypes. `DTYPES` has them side by side, and `dtypes`
reads the table in either direction. Torch's and ONNX's own objects follow from it where these
packages are imported: `moec.weights.view`, `moec.exporters.onnx`.
"""

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

#: what a graph computes in
DType = Literal["fp32", "fp16", "bf16"]


class Frozen(BaseModel):
    """Base of every spec: immutable. Unknown fields and infinite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Names(NamedTuple):
    """A dtype of `bits` and what it is called; "" where it has no name, or moec needs none.

    `torch` is an attribute of torch, and what config.json says; `onnx` a member of ONNX's enum.
    TensorRT lacks the dtypes that have no name there, or widens them: uint8 weights become int32,
    float64 becomes float32.
    """

    name: str
    bits: int
    torch: str = ""
    safetensors: str = ""
    onnx: str = ""
    tensorrt: str = ""
    triton: str = ""


DTYPES = (
    #     ours     bits  torch            safetensors  ONNX            TensorRT  Triton
    Names("fp32", 32, "float32", "F32", "FLOAT", "FLOAT", "fp32"),
    Names("fp16", 16, "float16", "F16", "FLOAT16", "HALF", "fp16"),
    Names("bf16", 16, "bfloat16", "BF16", "BFLOAT16", "BF16", "bf16"),
    Names("fp8", 8, "float8_e4m3fn", "F8_E4M3", "FLOAT8E4M3FN", "FP8", "fp8e4nv"),
    Names("fp4", 4, "", "", "FLOAT4E2M1", "FP4"),
    Names("int4", 4, "", "", "INT4", "INT4"),
    Names("uint4", 4, "uint4", "", "UINT4"),
    Names("int8", 8, "int8", "I8", "INT8", "INT8"),
    Names("int32", 32, "int32", "I32", "INT32", "INT32", "i32"),
    Names("int64", 64, "int64", "I64", "INT64", "INT64", "i64"),
    Names("bool", 8, "bool", "BOOL", "BOOL", "BOOL", "i1"),
    Names("fp64", 64, "float64", "F64", "DOUBLE"),
    Names("int16", 16, "int16", "I16", "INT16"),
    Names("uint8", 8, "uint8", "U8", "UINT8"),
)
BYTES = {each.name: each.bits / 8 for each in DTYPES}


def dtypes(by: str, to: str) -> dict[str, str]:
    """One column of `DTYPES` by another, for the rows that have both.

    `by` and `to` are fields of `Names`, such as "onnx" and "tensorrt".
    """
    pairs = ((getattr(each, by), getattr(each, to)) for each in DTYPES)
    return {key: value for key, value in pairs if key and value}
