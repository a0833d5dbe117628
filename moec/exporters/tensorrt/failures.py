"""What TensorRT says when it fails, and what that means to people."""

import re
from collections.abc import Sequence

from moec.artefact.engine_job import Job
from moec.exporters.tensorrt.api import PACKAGES
from moec.spec.errors import MoecError

_NO_GPU = r"cudaError (35|100)\b|CUDA driver version is insufficient|no CUDA-capable device"
_NO_MEMORY = r"OutOfMemory|out of memory|bad_alloc|MemoryError|Cannot allocate memory"
#: what a message matches -> what was expected, what to do, exit code; the first row that fits
_MEANINGS = (
    (_NO_GPU, "a GPU, or architectures to build for", "name the architectures", 3),
    (
        _NO_MEMORY,
        "memory for the model's weights, two to three times over",
        "build where there is more memory",
        1,
    ),
    (
        r"is_decomposable|not supported by a dedicated kernel",
        "attention in bf16 or fp16, or one that may be decomposed",
        "use --precision bf16, or mark the attention TRT_decomposable",
        1,
    ),
    (
        r"Plugin not found|was not found in plugin registry",
        "an operator of TensorRT's own, or of a plugin library that was loaded",
        "give the plugin library, or build for a target that has the operator",
        1,
    ),
    (
        r"has datatype FP8 but is not consumed by",
        "FP8 tensors that are dequantized before anything else reads them",
        "use --precision bf16",
        1,
    ),
    (
        r"HW-specific datatypes",
        "dtypes that every architecture of the build has (bf16: SM80, FP8: SM89, FP4: SM120)",
        "leave the older architectures out, or use --precision fp16",
        2,
    ),
    (r"duplicate tensor name", "one weight of each name", "build the model again", 1),
)
#: where in TensorRT's own sources; and what follows every message where there is no GPU
_NOISE = re.compile(r" *\bIn [\w:~]+ at /_src/[\w./]+:\d+| *\[checkMacros\.cpp::catchCudaError.*")
_HEAD = re.compile(r"^I\w+::\w+: Error Code \d+: ")


def failure(where: str, job: Job, messages: Sequence[str]) -> MoecError:
    """The refusal for the first of `messages`, TensorRT's own words in the order they came."""
    messages = [_HEAD.sub("", _NOISE.sub("", message)).strip() for message in messages]
    found = next(filter(None, messages), "an error without a message")
    title = PACKAGES[job.package][0]
    for pattern, expected, next_step, code in _MEANINGS:
        if any(re.search(pattern, message) for message in messages):
            return MoecError(where, found, expected, next_step, exit_code=code)
    return MoecError(
        where, found, f"a model that {title} builds", "try another --precision", exit_code=1
    )


def ran_out(messages: Sequence[str]) -> bool:
    """Whether a message says that memory ran out."""
    return any(re.search(_NO_MEMORY, message) for message in messages)
