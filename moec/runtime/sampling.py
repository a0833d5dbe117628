"""Sample the next token from logits."""

import torch
from torch import Tensor


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
    """
    if temperature == 0:
        return logits.argmax(-1)
    ordered, tokens = (logits.double() / temperature).sort(-1, descending=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    shares = ordered.softmax(-1)
    if top_p is not None:
        # Keep the smallest set that reaches top_p: drop a token if those before it reach top_p.
        shares[shares.cumsum(-1) - shares >= top_p] = 0
    drawn = torch.multinomial(shares, 1, generator=generator)
    return tokens.gather(-1, drawn)[:, 0]
