"""Sample the next token from logits."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from numbers import Integral, Real
from operator import index
from typing import Any, TypedDict

import torch
from torch import Tensor

from moec.runtime.inputs.arrays import Ids
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec, Sampling

#: what chooses the next tokens of a generation: logits [B, vocab] to tokens, int64 [B]
Choose = Callable[[Tensor], Tensor]

#: A smaller temperature gives the same tokens, but quotients that float64 does not hold.
_COLDEST = 1e-200
#: the largest temperature that float64 holds
_HOTTEST = 1.7e308


class Settings(TypedDict, total=False):
    """The keyword arguments of `Session.generate`."""

    lengths: Ids | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    repetition_penalty: float | None
    stop: Sequence[int] | None
    stream: Callable[[list[int | None]], None] | None
    mtp: bool


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Choose one token for each sequence: logits [B, vocab] to tokens, int64 [B].

    Temperature 0 takes the largest logit. Otherwise logits are divided by the temperature, then
    limited to the `top_k` largest, then to the smallest set of tokens whose probability reaches
    `top_p`, then to those that are at least `min_p` times as likely as the likeliest.

    Raises:
        MoecError: there are no probabilities to draw from, because a logit is not finite (exit
            code 1).
    """
    if temperature == 0:
        return likeliest(logits)
    if not logits.isfinite().all():
        refuse(
            "logits",
            "infinity or NaN",
            "finite numbers",
            "moec validate finds the layer; temperature 0 takes the largest",
            exit_code=1,
        )
    ordered, tokens = (logits.double() / max(temperature, _COLDEST)).sort(-1, descending=True)
    if top_k is not None:
        ordered[:, min(top_k, ordered.shape[1]) :] = -torch.inf
    shares = ordered.softmax(-1)
    if top_p is not None:
        # Keep the smallest set that reaches top_p: drop a token if those before it reach top_p.
        shares[shares.cumsum(-1) - shares >= top_p] = 0
    if min_p is not None:
        shares[shares < min_p * shares[:, :1]] = 0
    drawn = torch.multinomial(shares, 1, generator=generator)
    return tokens.gather(-1, drawn)[:, 0]


def chooser(
    spec: ModelSpec,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    penalty: float | None = None,
) -> Callable[[Sequence[Sequence[int]]], Choose]:
    """What makes, from the prompts of a generation, what chooses its next tokens.

    `spec` has what the checkpoint asks for, and the rest is what the caller does.

    Raises:
        MoecError: an argument is no setting that a draw can follow.
    """
    temperature, top_k, top_p, min_p = asked(spec.sampling, temperature, top_k, top_p)
    less = spec.repetition_penalty if penalty is None else penalty
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed, less)
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        return sample(logits.cpu(), temperature, top_k, top_p, generator, min_p)

    return partial(penalised, draw if temperature else likeliest, less)


def likeliest(logits: Tensor) -> Tensor:
    """The tokens with the largest logits, chosen where the logits are."""
    return logits.argmax(-1)


def penalised(choose: Choose, penalty: float, prompts: Sequence[Sequence[int]]) -> Choose:
    """`choose`, by logits in which the tokens that a sequence has are `penalty` times less likely.

    These are those of its prompt, and those that have been chosen. As in transformers, positive
    logits are divided by the penalty, and negative ones are multiplied.
    """
    if penalty == 1:
        return choose
    seen: Tensor | None = None

    def choose_new(logits: Tensor) -> Tensor:
        nonlocal seen
        if seen is None:
            seen = torch.zeros(logits.shape, dtype=torch.bool)
            for row, prompt in zip(seen, prompts, strict=True):
                row[torch.tensor(prompt, dtype=torch.long)] = True
            seen = seen.to(logits.device)
        less = torch.where(logits < 0, logits * penalty, logits / penalty)
        tokens = choose(torch.where(seen, less, logits))
        seen.scatter_(1, tokens[:, None].to(seen.device), True)
        return tokens

    return choose_new


def ends(stop: Sequence[int] | None, own: Sequence[int]) -> set[int]:
    """The tokens that end a sequence: `stop`, or the model's `own` if that is None.

    Raises:
        MoecError: `stop` is no list of token ids.
    """
    if stop is None:
        return set(own)
    with suppress(TypeError):
        if not isinstance(stop, bytes):
            return {index(each) for each in stop}  # integers of torch and NumPy too
    refuse("stop", repr(stop)[:200], "a list of token ids", "give [] to stop nowhere")


def _is(kind: type, value: Any, least: float, most: float) -> bool:
    """Whether `value` is a number of `kind`, from `least` to `most`. NaN is in no range."""
    known: Any = value
    return isinstance(value, kind) and not isinstance(value, bool) and least <= known <= most


def asked(
    sampling: Sampling | None, temperature: float | None, top_k: int | None, top_p: float | None
) -> tuple[float, int | None, float | None, float | None]:
    """Temperature, top_k, top_p and min_p of a call that may give no temperature.

    `sampling` is what the checkpoint asks for then, if anything. The caller's own limits replace
    its limits.
    """
    if temperature is not None or sampling is None:
        return 0.0 if temperature is None else temperature, top_k, top_p, None
    if top_k is None and top_p is None:
        return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    return sampling.temperature, top_k, top_p, None


def check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    repetition_penalty: float = 1.0,
) -> None:
    """Refuse settings that no draw can follow.

    Raises:
        MoecError: names the first.
    """
    for name, given, good, expected in (
        (
            "max_new_tokens",
            max_new_tokens,
            isinstance(max_new_tokens, int) and max_new_tokens >= 0,
            "an integer, 0 or more",
        ),
        ("seed", seed, seed is None or _is(Integral, seed, 0, 2**63 - 1), "0 to 2^63 - 1"),
        ("temperature", temperature, _is(Real, temperature, 0, _HOTTEST), "0 or more, and finite"),
        ("top_k", top_k, top_k is None or _is(Integral, top_k, 1, 2**63), "1 to 2^63"),
        ("top_p", top_p, top_p is None or (_is(Real, top_p, 0, 1) and top_p), "above 0, at most 1"),
        (
            "repetition_penalty",
            repetition_penalty,
            _is(Real, repetition_penalty, 1e-6, 1e6),
            "1e-6 to 1e6; 1 changes nothing",
        ),
    ):
        if not good:
            refuse(name, given, expected, f"correct --{name.replace('_', '-')}")
