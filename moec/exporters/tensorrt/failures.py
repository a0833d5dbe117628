"""Turn TensorRT's error messages into errors that say what to do."""

import re
from collections.abc import Sequence

from moec.artefact.engine_job import Job
from moec.exporters.tensorrt.api import PACKAGES
from moec.spec.errors import MoecError

_NO_GPU = r"cudaError (35|100)\b|CUDA driver version is insufficient|no CUDA-capable device"
_NO_MEMORY = r"OutOfMemory|out of memory|bad_alloc|MemoryError|Cannot allocate memory"
#: (pattern of a message, what was expected, what to run next, exit code); the first match counts
_MEANINGS = (
    (_NO_GPU, "a GPU, or architectures to build for", "name the architectures", 3),
    (
        _NO_MEMORY,
        "memory for the model's weights, two to three times their size",
        "build on a machine with more memory",
        1,
    ),
    (
        r"is_decomposable|not supported by a dedicated kernel",
        "attention in bf16 or fp16, or attention that TensorRT may decompose",
        "use --precision bf16, or mark the attention TRT_decomposable",
        1,
    ),
    (
        r"Plugin not found|was not found in plugin registry",
        "an operator of TensorRT, or of a plugin library that was loaded",
        "give the plugin library, or build for a target that has the operator",
        1,
    ),
    (
        r"has datatype FP8 but is not consumed by",
        "FP8 tensors that only DequantizeLinear reads",
        "use --precision bf16",
        1,
    ),
    (
        r"HW-specific datatypes",
        "types of every architecture of the build (bf16: SM80, FP8: SM89, FP4: SM120, or newer)",
        "leave the older architectures out, or use --precision fp16",
        2,
    ),
    (r"duplicate tensor name", "one weight for each name", "build the model again", 1),
)
#: parts of a message without information: a line of TensorRT's sources, and the text that follows
#: every message if there is no GPU
_NOISE = re.compile(r" *\bIn [\w:~]+ at /_src/[\w./]+:\d+| *\[checkMacros\.cpp::catchCudaError.*")
_HEAD = re.compile(r"^I\w+::\w+: Error Code \d+: ")


def failure(where: str, job: Job, messages: Sequence[str]) -> MoecError:
    """The error for TensorRT's `messages`, in the order in which they came. The first is shown."""
    messages = [_HEAD.sub("", _NOISE.sub("", message)).strip() for message in messages]
    found = next(filter(None, messages), "an error without a message")
    title = PACKAGES[job.package][0]
    for pattern, expected, next_step, code in _MEANINGS:
        if any(re.search(pattern, message) for message in messages):
            return MoecError(where, found, expected, next_step, exit_code=code)
    return MoecError(
        where, found, f"a model that {title} can build", "try another --precision", exit_code=1
    )


def ran_out(messages: Sequence[str]) -> bool:
    """Whether one of the messages says that memory ran out."""
    return any(re.search(_NO_MEMORY, message) for message in messages)
