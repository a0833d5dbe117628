"""Target `torch`: a program of fused FP8 ops, which our kernels run on a GPU."""

from moec.artefact.targets import Precision, Target

TARGET = Target(
    name="torch",
    # The builder says why an FP8 checkpoint, whose weights would stay, is refused.
    precisions={"fp8": Precision("torch", "torch", "bf16")},
    builder="moec.targets.torch.build:BUILDER",
    engines={"torch": "moec.runtime.engines.torch_program:ENGINE"},
    suffix=".pt2",
    scheme="dynamic",
    # The kernels for many tokens take widths that 256 divides, experts that 128 divides, and
    # attention heads of 16 or more.
    reduced={"torch": {"block": 128, "head_dim": 16}},
)
