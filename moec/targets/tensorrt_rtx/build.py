"""How target `tensorrt-rtx` builds: like `tensorrt`, for GPUs that may be in other machines."""

from dataclasses import replace

from moec.artefact.engine_options import ARCHITECTURES, EngineOptions
from moec.exporters.tensorrt.build import check_weight_inputs
from moec.targets.tensorrt.build import BUILDER as TENSORRT
from moec.targets.tensorrt.build import compiler


def check_options(options: EngineOptions, dialect: str) -> EngineOptions:
    """Complete `options`: if they name no GPUs, the engines are built for the usual ones.

    Raises:
        MoecError: the options name weight inputs that the dialect does not have.
    """
    check_weight_inputs(options, dialect)
    if options.architectures:
        return options
    return options.model_copy(update={"architectures": ARCHITECTURES})


BUILDER = replace(TENSORRT, compiler=replace(compiler("tensorrt_rtx"), check=check_options))
