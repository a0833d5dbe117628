"""Write the sources of the MoE plugin for a model to a folder, and compile them if possible.

The folder has all that is needed to compile the plugin elsewhere. Its build.sh needs a C++
compiler, and the headers of TensorRT and CUDA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moec.kernels.ahead_of_time.operations import moe_layer
from moec.kernels.ahead_of_time.program import build_programs, identity
from moec.kernels.launcher.build import Face, write_library
from moec.kernels.sizes import Sizes

LIBRARY = "libmoec_plugin.so"
FACE = Face(
    library=LIBRARY,
    package=__package__,
    sources=("moe_plugin.cpp",),
    headers={"NvInferRuntime.h": "TENSORRT_INCLUDE"},
    notes=" TENSORRT_INCLUDE names the folder with NvInferRuntime.h of TensorRT 11\n"
    "# or TensorRT-RTX, whichever will load the library.",
)


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that was written to `folder`, and compiled if possible.

    If `library` is None, `why` says why it was not compiled. `command` compiles it. `programs` has
    the SHA-256 of each size's program, which a TensorRT engine records.
    """

    folder: Path
    library: Path | None
    why: str
    command: str
    programs: dict[Sizes, str]


def compile_plugin(
    sizes: Sequence[Sizes],
    max_tokens: int,
    architectures: Sequence[int],
    out: Path,
    include: Path | None = None,
) -> Plugin:
    """Write the plugin for MoE layers of these `sizes` to the folder `out`, and compile it.

    A layer runs at most `max_tokens` tokens at once and splits larger calls. `include` is the
    folder of TensorRT's headers; by default it is TENSORRT_INCLUDE or a usual folder.

    Raises:
        MoecError: there are no kernels for these sizes or architectures.
        OSError: the files cannot be written.
    """
    operations = {each: moe_layer(each, max_tokens) for each in dict.fromkeys(sizes)}
    made = dict(zip(operations, build_programs(operations.values(), architectures), strict=True))
    headers = {"TENSORRT_INCLUDE": include} if include else {}
    found = write_library(FACE, b"".join(made.values()), out, headers)
    programs = {each: identity(made[each]) for each in made}
    return Plugin(out, found.library, found.why, found.command, programs)
