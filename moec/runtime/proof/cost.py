"""Measure what a precision costs: compare an artefact with the wide weights it was made from."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from moec.artefact.artefact import Artefact
from moec.runtime.inputs.token_file import read_rows
from moec.runtime.open import eager_session
from moec.runtime.proof.source import as_stored
from moec.runtime.proof.under_test import ArtefactUnderTest
from moec.runtime.session import Session
from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.files import other_model
from moec.spec.hf.forms import checkpoint_folder
from moec.weights.name_map import read_model

#: the number of sequences that the reference generates if the user gives none, and their length
ROWS, TOKENS = 4, 128


@dataclass(frozen=True, slots=True)
class Cost:
    """What a precision costs, as means over all tokens but the last of each sequence.

    Each model computes every layer from its own values.

    Attributes:
        reference: the folder of the wide weights.
        text: where the tokens come from.
        tokens: the number of tokens.
        reference_perplexity, perplexity: of the wide weights and of the artefact.
        kl: the KL divergence of the artefact from the reference, in nats a token.
        kl_99: its 99th percentile.
        same_choice: the share of tokens after which both find the same token likeliest.
        router_flips: the share of tokens and layers for which the experts differ.
        flips: the same for each layer.
        layers: the relative error of each layer's output.
    """

    reference: str
    text: str
    tokens: int
    reference_perplexity: float
    perplexity: float
    kl: float
    kl_99: float
    same_choice: float
    router_flips: float
    flips: dict[str, float]
    layers: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return asdict(self)


def cost(
    artefact: Artefact,
    reference: str,
    rows: Tensor | str | Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Cost:
    """Compare `artefact` with the float32 eager reference on wide weights, on the same tokens.

    Args:
        reference: the checkpoint of the wide weights; "bf16", "fp16" or "fp32" means the checkpoint
            from which the artefact was built.
        rows: token ids [n, length], or a file of them (see `read_rows`); None: the reference
            generates them at temperature 1.
        device: where the artefact runs.
        seed: the seed of that generation.
        progress: called with (stage, done, total).

    Raises:
        MoecError: the reference is missing, has FP8 weights, or is another model.
    """
    folder = _folder(artefact, reference)
    spec, _, entries = read_model(folder, mtp=artefact.manifest.spec.text.mtp == "built")
    if spec.scheme:
        refuse(
            f"--reference {reference}: {folder}",
            spec.scheme.shown,
            "the wide weights that they were made from",
            "--reference DIR",
        )
    wanted = artefact.manifest.spec.model_copy(update={"scheme": None})
    odd = other_model(as_stored(artefact, spec, entries)[0], wanted, "dtype")
    if odd:
        refuse(
            f"--reference {folder}: {odd[0][0]}",
            odd[0][1],
            f"{odd[0][2]}, as in {artefact.path}",
            "name the checkpoint of the same model",
        )
    taps = [names.out(layer.index) for layer in spec.text.all_layers]
    routes = [names.chosen(layer.index) for layer in spec.text.all_layers if layer.moe]
    wide = eager_session(spec, entries, "fp32", taps=[*taps, *routes])
    narrow = ArtefactUnderTest(artefact, device, "lean").session([*taps, *routes])
    text = "given rows"
    if rows is None:
        rows, text = _draw(wide, seed), f"rows that the reference drew, seed {seed}"
    else:
        text = text if isinstance(rows, Tensor) else str(rows)
        rows = read_rows(rows, spec, folder)
    if rows.shape[1] < 2:
        refuse(
            "--eval", f"rows of {rows.shape[1]} token", "2 tokens a row or more", "give longer rows"
        )
    sums = _Sums(taps, routes)
    for done, row in enumerate(rows):
        progress("cost", done, len(rows))
        found = [_trace(session, row, [*taps, *routes]) for session in (wide, narrow)]
        for where, each in zip((folder, artefact.path), found, strict=True):
            if not bool(each["logits"].isfinite().all()):
                refuse(
                    where,
                    "logits that are not finite",
                    "finite weights",
                    f"moec validate {artefact.path}",
                    exit_code=1,
                )
        sums.add(row, *found)
    progress("cost", len(rows), len(rows))
    return sums.cost(str(folder), text)


def _folder(artefact: Artefact, reference: str) -> Path:
    if reference not in ("bf16", "fp16", "fp32"):
        if checkpoint_folder(reference) is None:
            refuse(
                f"--reference {reference}",
                "no such folder",
                "bf16 (the weights that were built from), or the folder of wide weights",
                "correct --reference",
            )
        return Path(reference)
    known = artefact.checkpoint
    if known is None or checkpoint_folder(known) is None:
        found = f"{artefact.path}, whose checkpoint is {artefact.manifest.checkpoint or 'unbound'}"
        refuse(
            f"--reference {reference}",
            found,
            "wide weights",
            "name their folder: --reference DIR",
        )
    return known


def _draw(session: Session, seed: int) -> Tensor:
    """Generate sequences that the model finds likely: random tokens would be noise to it."""
    start = session.spec.tokens.bos
    first = torch.full((ROWS, 1), 0 if start is None else start)
    rows: Tensor = session.generate(
        first,
        max_new_tokens=TOKENS - 1,
        temperature=1.0,
        repetition_penalty=1.0,
        seed=seed,
        stop=(),
    )
    return rows


def _trace(session: Session, row: Tensor, taps: list[str]) -> dict[str, Tensor]:
    return session.trace(row[None], torch.tensor([len(row)]), taps)


class _Sums:
    """Running sums over sequences, so that memory holds the logits of one sequence only."""

    def __init__(self, layers: list[str], routes: list[str]) -> None:
        self.layers, self.routes = layers, routes
        self.tokens = self.predicted = 0
        self.nll = [0.0, 0.0]
        self.kl: list[Tensor] = []
        self.same = 0
        self.flips = dict.fromkeys(routes, 0)
        self.error = {name: [0.0, 0.0] for name in layers}

    def add(self, row: Tensor, wide: dict[str, Tensor], narrow: dict[str, Tensor]) -> None:
        logs = [functional.log_softmax(x["logits"].double(), -1) for x in (wide, narrow)]
        for i, log in enumerate(logs):
            self.nll[i] -= float(log[:-1].gather(1, row[1:, None]).sum())
        self.kl.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1)[:-1])
        self.same += int((logs[0][:-1].argmax(-1) == logs[1][:-1].argmax(-1)).sum())
        self.tokens += len(row)
        self.predicted += len(row) - 1
        for name in self.routes:
            chosen = [x[name].sort(-1).values for x in (wide, narrow)]
            self.flips[name] += int((chosen[0] != chosen[1]).any(-1).sum())
        for name in self.layers:
            off = (narrow[name].double() - wide[name].double()).square().sum()
            self.error[name][0] += float(off)
            self.error[name][1] += float(wide[name].double().square().sum())

    def cost(self, reference: str, text: str) -> Cost:
        kl = torch.cat(self.kl)
        short = {name: names.layer(names.layer_of(name) or 0) for name in self.routes}
        return Cost(
            reference=reference,
            text=text,
            tokens=self.tokens,
            reference_perplexity=math.exp(self.nll[0] / self.predicted),
            perplexity=math.exp(self.nll[1] / self.predicted),
            kl=float(kl.mean()),
            kl_99=float(kl.quantile(0.99)),
            same_choice=self.same / self.predicted,
            router_flips=sum(self.flips.values()) / max(1, self.tokens * len(self.routes)),
            flips={short[name]: count / self.tokens for name, count in self.flips.items()},
            layers={
                names.title(name): math.sqrt(off / max(size, 1e-300))
                for name, (off, size) in self.error.items()
            },
        )
