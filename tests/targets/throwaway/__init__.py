"""Target `throwaway`: the spec as JSON, which the eager graph runs. A test copies this folder."""

from moec.artefact.targets import Precision, Target

TARGET = Target(
    name="throwaway",
    precisions={"fp32": Precision("spec", None, "fp32")},
    builder="moec.targets.throwaway.build:BUILDER",
    engines={"throwaway": "moec.targets.throwaway.run:ENGINE"},
    suffix=".spec",
)
