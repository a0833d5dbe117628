"""Target `torch`: a program that torch runs, in FP8 with moec's kernels on a GPU."""

from moec.artefact.targets import Precision, Target

#: weights of the dialect's own layout, which moec packs
_WIDE = {name: Precision(None, "torch-plain", name) for name in ("bf16", "fp16", "fp32")}

TARGET = Target(
    name="torch",
    # The builder refuses FP8 checkpoints that it cannot run as they are, and says why.
    precisions={"fp8": Precision("torch", "torch", "bf16"), **_WIDE},
    builder="moec.targets.torch.build:BUILDER",
    engines={"torch": "moec.runtime.engines.torch_program:ENGINE"},
    suffix=".pt2",
    scheme="dynamic",
    # The prefill kernels need a model width that is a multiple of 256, experts whose width is a
    # multiple of 128, and attention heads of 16 or more. Plain programs run any width; with these
    # their FP8 products go through the kernels.
    reduced={
        "torch": {"block": 128, "head_dim": 16},
        "torch-plain": {"block": 32, "head_dim": 16},
    },
)
