"""How far a value may be from the right one: as far as rounding takes it, and little further."""

import pytest
import torch

from moec.runtime.proof.each_op.distance import MULTIPLE, distance, sums

TOKENS, TERMS = 64, 4096


def _sums(cancel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of one column in float64 and in float32; the last token's terms cancel."""
    torch.manual_seed(0)
    terms = torch.randn(TOKENS, TERMS)
    right = terms.double().sum(1, keepdim=True)
    if cancel:
        terms[-1, -1] -= right[-1, 0].float()
        right = terms.double().sum(1, keepdim=True)
    return right, terms.sum(1, keepdim=True)


@pytest.mark.parametrize("times, passes", [(0.3, True), (3, False)])
def test_a_sum_that_cancels_has_the_noise_of_its_terms(times: float, passes: bool) -> None:
    right, near = _sums(cancel=True)
    near[-1] = right[-1].float()  # rounding was lucky here
    noise = (near.double() - right).abs().median()
    value = near.double()
    value[-1] += times * MULTIPLE * noise
    found = distance("x", value, right, near)
    assert (found.ratio <= 1) == passes
    assert found.error < 1e-4, "relative to what other tokens are like"


def test_errors_of_small_tokens_are_found() -> None:
    """Eight tokens are a thousand times as small as the others."""
    torch.manual_seed(0)
    right = torch.randn(TOKENS, 32).double()
    right[:8] *= 1e-3
    near = right.float()
    value = near.double()
    value[0] += 1e-5 * right[1:].abs().max()
    assert distance("x", value, right, near).ratio > 1


@pytest.mark.parametrize("outputs, tokens", [(1, 1), (1, 2), (2, 2), (3, 1)])
def test_few_outputs_of_few_tokens_raise_no_alarm(outputs: int, tokens: int) -> None:
    """An engine may add one term after another, and the reference in blocks."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, 256) / 16
    found = 0.0
    for _ in range(1000):
        x = torch.randn(tokens, 256)
        value = torch.zeros(tokens, outputs)
        for term in (x[:, None] * weight).unbind(-1):
            value += term
        right = x.double() @ weight.double().t()
        near = torch.nn.functional.linear(x, weight)
        found = max(found, distance("x", value, right, near, sums(x, weight)).ratio)
    assert found <= 0.5
    wrong = value + 1e-5 * x.norm() / 16
    assert distance("x", wrong, right, near, sums(x, weight)).ratio > 1
