"""Sample the next token from logits."""

import torch
from torch import Tensor

from moec.spec.errors import refuse


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose one token for each sequence: logits [B, vocab] to tokens, int64 [B].

    Temperature 0 takes the largest logit. Otherwise logits are divided by the temperature, then
    limited to the `top_k` largest, then to the smallest set of tokens whose probability reaches
    `top_p`.

    Raises:
        MoecError: there are no probabilities to draw from, because a logit is not finite (exit
            code 1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    if not logits.isfinite().all():
        refuse(
            "logits",
            "infinity or NaN",
            "finite numbers",
            "moec validate finds the layer; temperature 0 takes the largest",
            exit_code=1,
        )
    scaled = logits.double() / temperature
    if not scaled.isfinite().all():  # so cold that only the largest keeps a share
        scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    ordered, tokens = scaled.sort(-1, descending=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    shares = ordered.softmax(-1)
    if top_p is not None:
        # Keep the smallest set that reaches top_p: drop a token if those before it reach top_p.
        shares[shares.cumsum(-1) - shares >= top_p] = 0
    drawn = torch.multinomial(shares, 1, generator=generator)
    return tokens.gather(-1, drawn)[:, 0]


def check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> None:
    """Refuse settings that no draw can follow.

    Raises:
        MoecError: names the first.
    """
    for name, given, good, expected in (
        ("max_new_tokens", max_new_tokens, isinstance(max_new_tokens, int), "an integer"),
        ("seed", seed, seed is None or 0 <= seed < 2**63, "0 to 2^63 - 1"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
    ):
        if not good:
            refuse(name, given, expected, f"correct --{name.replace('_', '-')}")
