"""Target `torch`: a program of fused FP8 ops, which moec's kernels run on a GPU."""

from moec.artefact.targets import Precision, Target

TARGET = Target(
    name="torch",
    # FP8 checkpoints are allowed here so that the builder can say why it refuses them.
    precisions={"fp8": Precision("torch", "torch", "bf16")},
    builder="moec.targets.torch.build:BUILDER",
    engines={"torch": "moec.runtime.engines.torch_program:ENGINE"},
    suffix=".pt2",
    scheme="dynamic",
    # The prefill kernels need a model width that is a multiple of 256, experts whose width is a
    # multiple of 128, and attention heads of 16 or more.
    reduced={"torch": {"block": 128, "head_dim": 16}},
)
