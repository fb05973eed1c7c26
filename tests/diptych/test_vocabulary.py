"""The loss of tokens in tiles equals its dense float64 twin, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych import vocabulary
from diptych.vocabulary import IGNORED, TokenLoss, token_losses

TOKENS, WIDTH, WORDS = 23, 6, 40
FORMS = [TokenLoss(), TokenLoss(label_smoothing=0.2), TokenLoss(z_loss=0.03), TokenLoss(0.1, 0.01)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of four tokens, the last one of fewer."""
    monkeypatch.setattr(vocabulary, "_TILE_BYTES", 4 * 4 * WORDS)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and vocabulary as leaves, targets with ignored ones, a gradient for each loss."""
    generator = torch.Generator().manual_seed(0)
    hidden, matrix = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).mul(2).to(dtype).requires_grad_()
        for shape in ((TOKENS, WIDTH), (WIDTH, WORDS))
    )
    targets = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    targets[[0, 5, 6, 22]] = IGNORED
    return hidden, matrix, targets, torch.randn(TOKENS, generator=generator, dtype=torch.float64)


def dense(hidden: Tensor, matrix: Tensor, targets: Tensor, form: TokenLoss) -> Tensor:
    logits = hidden @ matrix
    smoothing = form.label_smoothing
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing, ignore_index=IGNORED)
    return loss + torch.where(targets != IGNORED, form.z_loss * logits.logsumexp(1) ** 2, 0)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_tiles_equal_the_dense_loss(form: TokenLoss) -> None:
    hidden, matrix, targets, gradient = inputs()
    ours = token_losses(hidden, matrix, targets, form)
    ours.backward(gradient)
    found = (hidden.grad, matrix.grad)
    hidden, matrix, targets, gradient = inputs()
    theirs = dense(hidden, matrix, targets, form)
    theirs.backward(gradient)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found, (hidden.grad, matrix.grad))
    assert (ours[targets == IGNORED] == 0).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_added_up_in_float32(form: TokenLoss, autocast: bool) -> None:
    hidden, matrix, targets, gradient = inputs()
    dense(hidden.bfloat16().double(), matrix, targets, form).backward(gradient)
    expected = (hidden.grad, matrix.grad)
    low = hidden.detach().bfloat16().requires_grad_()
    single = matrix.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = token_losses(low, single, targets, form)
    losses.backward(gradient.float())
    assert losses.dtype == torch.float32
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(losses.double(), dense(low.double(), matrix, targets, form), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(single.grad, expected[1].float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(low.grad.double(), expected[0], atol=1e-4, rtol=2**-7)  # rounded once, to bf16


def test_only_asked_gradients_are_made() -> None:
    hidden, matrix, targets, _ = inputs()
    token_losses(hidden.detach(), matrix, targets, TokenLoss()).sum().backward()
    assert matrix.grad is not None
    again, frozen, _, _ = inputs()
    token_losses(again, frozen.detach(), targets, TokenLoss()).sum().backward()
    assert again.grad is not None


def test_large_logits_neither_overflow_nor_underflow() -> None:
    hidden, matrix, targets, _ = inputs(torch.float32)
    loud = (hidden.detach() * 300).requires_grad_()
    losses = token_losses(loud, matrix, targets, TokenLoss())
    losses.sum().backward()
    expected = dense(loud.double(), matrix.double(), targets, TokenLoss())
    torch.testing.assert_close(losses.double(), expected, atol=1e-2, rtol=1e-5)  # float32 of logits in the thousands
    assert loud.grad is not None
    assert loud.grad.isfinite().all()


def test_nothing_to_foretell_costs_nothing() -> None:
    hidden, matrix, _, _ = inputs()
    losses = token_losses(hidden, matrix, torch.full((TOKENS,), IGNORED), TokenLoss(0.1, 0.1))
    losses.sum().backward()
    assert losses.eq(0).all()
    assert hidden.grad is not None
    assert hidden.grad.eq(0).all()
