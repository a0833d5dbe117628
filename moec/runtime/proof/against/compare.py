"""The proof of a checkpoint across engines: the same prompts through another one.

The reference is the eager graph in float32, on the checkpoint's own weights. An engine that
computes in bf16 differs from it by what bf16 does to this model. That is measured: the eager graph
runs in bf16 too. Limits are small multiples of that noise, so that a mistake in reading weights,
which is far larger, shows.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.runtime.open import eager_session
from moec.runtime.proof.against.engines import EngineError, Other, find_other, run_other
from moec.runtime.proof.against.flips import own_tokens, settled_values
from moec.runtime.proof.each_op.static_scales import static_scales
from moec.runtime.proof.report import Check, Report
from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.hf.forms import for_others
from moec.spec.model import ModelSpec
from moec.weights.name_map import read_model
from moec.weights.shard import TensorEntry

Progress = Callable[[str, int, int], None]

#: how often the noise of the reference in bf16 another engine's difference may be: sound engines
#: need up to 2.1, because their bf16 is rounded in other places
TIMES = 3.0
#: the least limits, in nats: of an engine in float32, and of one in bf16
LEAST = {"fp32": 1e-4, "bf16": 2e-2}
#: the quantiles of the differences that are compared with the same quantiles of the noise. The
#: upper ones see faults that few tokens meet, such as those of one expert.
QUANTILES = (0.5, 0.9, 0.98)
#: the same for the middle of the tokens of one expert, if they are so many; few tokens vary more.
#: It is multiplied by how far above the noise the middle of all other tokens is.
OF_AN_EXPERT, ENOUGH = 1.7, 48
#: tokens that each prompt is continued by
NEW_TOKENS = 16
#: the share of greedy tokens that must be the reference's, near ties apart. In bf16 a near tie in a
#: router makes another token now and then.
SAME = {"fp32": 0.99, "bf16": 0.9}
#: the length of the longest prompt by default, where a chunk is longer
LONGEST = 600


def against(
    folder: str | Path,
    engine: str,
    tokens: int | None = None,
    seed: int | None = None,
    progress: Progress = lambda stage, done, total: None,
    python: str | Path | None = None,
    theirs: str | Path | None = None,
) -> Report:
    """Compare the checkpoint in `folder`, run by another engine, with the eager reference.

    Args:
        folder: a checkpoint, of moec or of anybody.
        engine: "vllm" or "transformers". It runs in a process of its own.
        tokens: the length of the longest prompt; default past a chunk border, if chunks are short.
        seed: the seed that prompts are drawn from; default a fresh one.
        progress: called with (stage, done, total).
        python: the interpreter that has the engine; default this one.
        theirs: the folder that the other engine reads; default `folder`.

    Raises:
        MoecError: the checkpoint is broken, or has an adapter beside its weights; a prompt would be
            too short or too long; or, with exit code 3, the engine is missing.
    """
    other = find_other(engine)
    theirs = for_others(theirs or folder)
    spec, _, entries = read_model(folder)
    seed = secrets.randbits(31) if seed is None else seed
    prompts = draw_prompts(spec, tokens, seed)
    scheme = spec.scheme
    job = {
        "folder": theirs,
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
        "images": spec.vision is not None,
        "quantised": scheme.layout if scheme else "",
    }
    precision = scheme.precision if scheme else spec.dtype
    report = Report(
        f"{spec.name} (checkpoint)",
        other.title,
        "the eager graph in float32" + ("" if other.rounds or not scheme else ", wide inputs"),
        precision,
        seed,
        [len(ids) for ids in prompts],
    )
    progress(f"run in {other.title}", 0, 1)
    try:
        found = run_other(engine, job, python)
    except EngineError as error:
        report.checks.append(Check("loads", "agreement", 0.0, 1.0, str(error)[:500]))
        return report
    report.engine = f"{other.title} {found['version']}"
    report.checks.append(Check("loads", "agreement", 1.0, 1.0, "every weight was taken"))
    report.checks += _checks(spec, entries, other, prompts, found, progress)
    report.checks += static_scales(spec, entries, torch.tensor(prompts[:1]))
    chunk = spec.text.kept
    if chunk is not None and max(map(len, prompts)) <= chunk:
        report.notes.append(
            f"No prompt crosses the border at {chunk:,} tokens: --tokens {chunk + 100} does."
        )
    return report


def draw_prompts(spec: ModelSpec, tokens: int | None, seed: int) -> list[list[int]]:
    """Prompts of random tokens: one of `tokens`, and two shorter ones."""
    chunk, most = spec.text.kept, spec.text.max_positions - NEW_TOKENS
    if tokens is None:
        tokens = min(most, max(128, 2 * chunk + 5) if chunk and chunk <= LONGEST // 2 else LONGEST)
    if not 8 <= tokens <= most:
        expected = f"8 to {most:,} tokens, with room for {NEW_TOKENS} new ones"
        refuse(f"--tokens {tokens}", f"{tokens} tokens", expected, "correct --tokens")
    generator = torch.Generator().manual_seed(seed)
    lengths = [tokens, max(4, tokens // 2 - 1), max(4, tokens // 5)]
    return [torch.randint(0, spec.text.vocab, (n,), generator=generator).tolist() for n in lengths]


def _checks(
    spec: ModelSpec,
    entries: dict[str, TensorEntry],
    other: Other,
    prompts: Sequence[Sequence[int]],
    found: dict[str, Any],
    progress: Progress,
) -> list[Check]:
    """Compare what the other engine `found` with the reference."""
    spec = spec if other.rounds else _wide_inputs(spec)
    narrow = other.computes == "bf16"
    least = LEAST[other.computes]
    given = [torch.tensor(each, dtype=torch.float64) for each in found["logprobs"]]
    logits, own, noise, chosen, flipped = [], [], [], [], 0
    for index, (ids, new) in enumerate(zip(prompts, found["tokens"], strict=True)):
        progress("reference", index, len(prompts))
        # in bf16 the limits have room for routers that flip
        odd = torch.inf if narrow else least
        values, flips = settled_values(spec, entries, ids, new, given[index], odd)
        flipped += flips
        logits.append(values.pop("logits"))
        own.append(own_tokens(logits[-1], ids))
        chosen.append({name: each[: len(ids) - 1] for name, each in values.items()})
        noise.append(own_tokens(_in_bf16(spec, entries, [*ids, *new]), ids) if narrow else own[-1])
    wide, theirs = torch.cat(own), torch.cat(given)
    off, basis = (theirs - wide).abs(), (torch.cat(noise) - wide).abs()
    off = torch.where(off.isfinite(), off, torch.inf)
    checks = []
    for quantile in QUANTILES:
        limit = max(least, TIMES * float(basis.quantile(quantile)))
        detail = f"{len(off)} tokens"
        if flipped:
            detail += f"; the engine's expert at {flipped} near ties"
        if narrow:
            detail += f"; what bf16 does: {float(basis.quantile(quantile)):.1e}"
        name = f"log-probabilities, {100 * quantile:g} % of the tokens below"
        checks.append(Check(name, "error", float(off.quantile(quantile)), limit, detail))
    near = checks[-1].limit
    groups = {name: torch.cat([each[name] for each in chosen]) for name in chosen[0]}
    checks += _by_expert(off, basis, groups, least)
    return [*checks, _greedy(logits, prompts, found["tokens"], near, SAME[other.computes])]


def _by_expert(
    off: Tensor, basis: Tensor, groups: dict[str, Tensor], least: float
) -> Iterator[Check]:
    """Check the tokens of the expert that are worst beside the noise; no tokens, no check.

    `groups` has the experts [tokens, k] that the reference chose, for each MoE layer. One expert of
    many is met by few tokens: all tokens together do not show what is wrong with it.
    """
    worst = None
    for name, experts in groups.items():
        for expert in sorted({*experts.flatten().tolist()}):
            mine = (experts == expert).any(-1)
            if int(mine.sum()) < ENOUGH:
                continue
            limit = OF_AN_EXPERT * _level(off[~mine], basis[~mine])
            limit = max(least, limit * float(basis[mine].quantile(0.5)))
            value = float(off[mine].quantile(0.5))
            detail = f"expert {expert} of layer {names.layer_of(name)}, {int(mine.sum())} tokens"
            check = Check("log-probabilities, tokens of one expert", "error", value, limit, detail)
            if worst is None or value / limit > worst.found / worst.limit:
                worst = check
    if worst:
        yield worst


def _level(off: Tensor, basis: Tensor) -> float:
    """How far above the noise the middle of some tokens is, from 1 to `TIMES`."""
    if not len(off):
        return 1.0
    return min(max(1.0, float(off.quantile(0.5) / basis.quantile(0.5).clamp(min=1e-12))), TIMES)


def _in_bf16(spec: ModelSpec, entries: dict[str, TensorEntry], ids: Sequence[int]) -> Tensor:
    """The log-probabilities [S, vocab] of each next token by the reference in bf16."""
    session = eager_session(spec, entries, "bf16")
    found = session.trace(torch.tensor([ids]), torch.tensor([len(ids)]), [])
    return found["logits"].double().log_softmax(-1)


def _greedy(
    logits: Sequence[Tensor],
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    near: float,
    share: float,
) -> Check:
    """Whether each token that the engine chose is the reference's, or nearly as likely."""
    same = ties = 0
    for likely, ids, new in zip(logits, prompts, tokens, strict=True):
        for step, token in enumerate(new):
            row = likely[len(ids) - 1 + step]
            gap = float(row.max() - row[token])
            same += gap == 0
            ties += 0 < gap <= near
    count = sum(map(len, tokens))
    detail = f"{count} tokens, {ties} near ties left out"
    return Check("greedy tokens", "agreement", (same + ties) / max(1, count), share, detail)


def _wide_inputs(spec: ModelSpec) -> ModelSpec:
    """`spec` for an engine that rounds no inputs."""
    scheme = spec.scheme
    if scheme is None:
        return spec
    rules = tuple(rule.model_copy(update={"inputs": "none"}) for rule in scheme.rules)
    return spec.model_copy(update={"scheme": scheme.model_copy(update={"rules": rules})})
