"""The artefact under test: it opens sessions on its engine, and on the reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact, Entry
from moec.artefact.targets import find_target
from moec.runtime.cache import new_cache
from moec.runtime.engines.eager import eager_engine
from moec.runtime.engines.engine import Engine, Run
from moec.runtime.open import artefact_session, eager_session, find_engine
from moec.runtime.session import Session
from moec.spec import names
from moec.spec.errors import refuse


@dataclass(frozen=True, slots=True)
class ArtefactUnderTest:
    """An artefact that is being proven, on a device and with a named set of session options.

    The reference reads the tensors of `source`, a checkpoint; None: those of the artefact. `last`
    holds the session that was opened last. In the methods, `taps` are the inner values that a call
    returns besides the outputs.
    """

    artefact: Artefact
    device: str
    options: str
    source: Mapping[str, Entry] | None = None
    last: dict[tuple[str, ...], Session] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        """The engine in which artefacts of its target are proven."""
        target = find_target(self.artefact.manifest.target)
        return find_engine(self.artefact, target.proofs.get(self.device, target.engine))

    @property
    def title(self) -> str:
        """The engine and the device, in words."""
        return self.engine.title + ("" if self.device == "cpu" else f" on {self.device}")

    @property
    def compute(self) -> str:
        """The dtype that the engine computes in: "fp32", "fp16" or "bf16"."""
        return self.engine.computes(self.artefact)

    def check_device(self) -> None:
        """Refuse a device that the engine cannot use (exit code 3), or that does not exist (2)."""
        if self.device not in ("cpu", "cuda"):
            refuse(f"device {self.device}", "no such device", "cpu or cuda", "choose one of them")
        self.engine.check(self.artefact, self.device)

    def session(self, taps: Sequence[str] = (), given: Sequence[str] = ()) -> Session:
        """Open a session on the engine, or return the one that was opened last for these values.

        One session is kept, because its weights may fill the memory. Calls of the decoder need
        inputs "NAME.given" for the inner values `given`, which stand for those that it computes.
        Only engines that have `gives` take any.
        """
        key = (self.options, *taps, "given", *given)
        if key in self.last:
            return self.last[key]
        self.last.clear()
        engine, gives = self.engine, self.engine.gives
        if given and gives:

            def opened(
                artefact: Artefact, part: str, device: str, options: str, taps: Sequence[str]
            ) -> Run:
                return gives(artefact, part, device, options, taps, given)

            engine = replace(engine, open=opened)
        session = artefact_session(self.artefact, self.device, self.options, taps, engine)
        self.last[key] = session
        return session

    def open(self, part: str, taps: Sequence[str]) -> Run:
        """Open one part alone, "vision" or "mtp"."""
        return self.engine.open(self.artefact, part, self.device, self.options, taps)

    def shown(self, part: str, wanted: Sequence[str]) -> list[str]:
        """Those of the inner values `wanted` of a part that the engine can show."""
        shown = self.engine.shown
        return shown(self.artefact, part, wanted) if shown else list(wanted)

    def entries(self) -> Mapping[str, Entry]:
        """Where the reference reads each parameter."""
        return self.artefact.entries() if self.source is None else self.source

    def reference(self, taps: Sequence[str] = (), near: float | None = None) -> Session:
        """Open the float32 eager reference on the same weights; `near` is as in `eager_engine`."""
        return eager_session(
            self.artefact.manifest.spec, self.entries(), "fp32", taps=taps, near=near
        )

    def reference_from(
        self,
        ids: Tensor,
        lengths: Tensor,
        given: Mapping[str, Tensor],
        taps: Sequence[str],
        codes: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run the reference on ids [B, S] with some inner values replaced by `given`.

        The reference computes each stretch of the graph from the given values before it. So the
        stretches are compared one by one, and their errors do not add up. `codes` are values in FP8
        that count where a rounding decides, as in `eager_engine`. Values are
        [tokens, ...] without padding, as `Session.trace` returns them.
        """
        spec, codes = self.artefact.manifest.spec, codes or {}
        run = eager_engine(
            spec, self.entries(), "fp32", taps, given=tuple(given), codes=tuple(codes)
        )
        own = torch.arange(ids.shape[1]) < lengths[:, None]
        cache = new_cache(spec, "fp32", len(ids), 0)
        feeds = {
            names.INPUT_IDS: ids,
            names.PAST_LENGTHS: cache.lengths,
            names.LENGTHS: lengths,
            names.LOGIT_INDEX: torch.arange(ids.shape[1]).repeat(len(ids), 1),
            **cache.tensors,
        }
        for name, rows in given.items():
            padded = torch.zeros(own.numel(), *rows.shape[1:])
            padded[own.flatten()] = rows.float()
            feeds[names.given(name)] = padded
        for name, rows in codes.items():
            bytes_ = torch.zeros(own.numel(), *rows.shape[1:], dtype=torch.uint8)
            bytes_[own.flatten()] = rows.view(torch.uint8)
            feeds[names.given(name)] = bytes_.view(rows.dtype)
        found = run(feeds)
        found["logits"] = found["logits"].flatten(0, 1)
        return {name: found[name][own.flatten()] for name in (*taps, "logits")}
