"""What a proof runs: an artefact in its engine, on a device, with one preset throughout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.exporters.artefact import Artefact
from moec.runtime import gpu
from moec.runtime.cache import new_cache
from moec.runtime.eager import Run, eager_engine
from moec.runtime.interpreter import interpreter
from moec.runtime.ort import check_kernels, ort_engine
from moec.runtime.session import Session, artefact_session, eager_session, interpreter_session
from moec.runtime.torch_engine import torch_engine
from moec.spec.errors import MoecError


def check_device(artefact: Artefact, device: str) -> None:
    """Refuse a device on which the artefact's engine cannot run it (exit code 3), or none (2)."""
    engine = artefact.manifest.engine
    if engine == "torch":
        gpu.check_device(device, str(artefact.path))
    elif engine != "tensorrt":
        check_kernels(artefact, device)
    elif device == "cuda":
        raise MoecError(
            f"{artefact.path} on {device}", "an engine, whose inner values nobody sees",
            "its ONNX, which is proven on the cpu", "leave --device out", exit_code=3,
        )  # fmt: skip
    elif device != "cpu":
        raise MoecError(f"device {device}", "no such device", "cpu or cuda", "choose one of them")


@dataclass(frozen=True, slots=True)
class Subject:
    """`artefact` as it is proven; `taps` below name inner values to make visible."""

    artefact: Artefact
    device: str
    preset: str

    @property
    def interpreted(self) -> bool:
        """Whether ONNX's interpreter stands in for an engine."""
        return self.artefact.manifest.engine == "tensorrt"

    @property
    def engine(self) -> str:
        """What runs it, in words."""
        if self.interpreted:
            return "ONNX's interpreter"
        return self.artefact.manifest.engine + (
            "" if self.device == "cpu" else f" on {self.device}"
        )

    @property
    def compute(self) -> str:
        """What it computes in: "fp32", "fp16" or "bf16"."""
        return "fp32" if self.interpreted else self.artefact.manifest.compute

    def session(self, taps: Sequence[str] = ()) -> Session:
        """A new session."""
        if self.interpreted:
            return interpreter_session(self.artefact, taps)
        return artefact_session(self.artefact, self.device, self.preset, taps)

    def tower(self, taps: Sequence[str]) -> Run:
        """The vision tower alone."""
        if self.interpreted:
            return interpreter(self.artefact, taps, "vision")
        if self.artefact.manifest.engine == "torch":
            return torch_engine(self.artefact, self.device, taps, "vision")
        return ort_engine(self.artefact, self.preset, taps, "vision", self.device)

    def reference(self, taps: Sequence[str] = (), near: float | None = None) -> Session:
        """The float32 eager reference on the same weights; `near` is as in `eager_engine`."""
        return eager_session(
            self.artefact.manifest.spec, self.artefact.entries(), "fp32", taps=taps, near=near
        )

    def reference_from(
        self, ids: Tensor, lengths: Tensor, given: Mapping[str, Tensor], taps: Sequence[str]
    ) -> dict[str, Tensor]:
        """What the reference makes of rows ids [B, S] if the inner values `given` are as given.

        So each stretch between two of them is compared by itself: an error cannot add to others.
        Values are [own tokens, ...], as `Session.trace` returns them.
        """
        spec = self.artefact.manifest.spec
        run = eager_engine(spec, self.artefact.entries(), "fp32", taps, given=tuple(given))
        own = torch.arange(ids.shape[1]) < lengths[:, None]
        cache = new_cache(spec, "fp32", len(ids), 0)
        feeds = {
            "input_ids": ids,
            "past_lengths": cache.lengths,
            "lengths": lengths,
            "logit_index": torch.arange(ids.shape[1]).repeat(len(ids), 1),
            **cache.tensors,
        }
        for name, rows in given.items():
            padded = torch.zeros(own.numel(), *rows.shape[1:])
            padded[own.flatten()] = rows.float()
            feeds[f"{name}.given"] = padded
        found = run(feeds)
        found["logits"] = found["logits"].flatten(0, 1)
        return {name: found[name][own.flatten()] for name in (*taps, "logits")}
