"""Losses against an independent evaluation in Python's float64, and their gradients."""

import math

import pytest
import torch

from oatlite.maths.losses import dpo, simpo

CHOSEN = [-12.5, -3.25, -40.0, 0.0, -700.0]
REJECTED = [-11.0, -9.5, -40.0, -55.0, -1.0]
REFERENCE_CHOSEN = [-13.0, -3.0, -41.5, -0.5, -650.0]
REFERENCE_REJECTED = [-10.0, -9.0, -38.0, -60.0, -2.0]


def float64(values, requires_grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def negative_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x


def close(tensor, expected):
    assert tensor.dtype == torch.float64
    assert tensor.shape == (len(expected),)
    torch.testing.assert_close(tensor.detach(), float64(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_dpo_is_equation_7(beta):
    result = dpo(*map(float64, (CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)), beta=beta)
    chosen = [beta * (p - r) for p, r in zip(CHOSEN, REFERENCE_CHOSEN, strict=True)]
    rejected = [beta * (p - r) for p, r in zip(REJECTED, REFERENCE_REJECTED, strict=True)]
    close(result.losses, [negative_log_sigmoid(c - r) for c, r in zip(chosen, rejected, strict=True)])
    close(result.chosen_rewards, chosen)
    close(result.rejected_rewards, rejected)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.6])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_simpo_is_equation_6(ratio, loss_type):
    beta = 2.5
    chosen, rejected = [-1.25, -0.5, -2.0, -0.01], [-1.0, -3.5, -2.0, -0.51]
    result = simpo(float64(chosen), float64(rejected), beta=beta, gamma_beta_ratio=ratio, loss_type=loss_type)
    margins = [beta * c - beta * r - beta * ratio for c, r in zip(chosen, rejected, strict=True)]
    expected = [negative_log_sigmoid(m) if loss_type == "sigmoid" else max(0.0, 1 - m) for m in margins]
    close(result.losses, expected)
    close(result.chosen_rewards, [beta * c for c in chosen])
    close(result.rejected_rewards, [beta * r for r in rejected])


def test_losses_push_chosen_up_and_rejected_down():
    inputs = [float64([-2.0, -3.0], requires_grad=True) for _ in range(4)]
    dpo(*inputs, beta=0.5).losses.sum().backward()
    assert (inputs[0].grad < 0).all()
    assert (inputs[1].grad > 0).all()


def test_rewards_are_metrics_and_carry_no_gradient():
    chosen, rejected = float64([-1.0], requires_grad=True), float64([-2.0], requires_grad=True)
    result = simpo(chosen, rejected, beta=2.0, gamma_beta_ratio=0.5)
    assert result.losses.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_gradients_agree_with_finite_differences():
    inputs = [float64(values[:4], requires_grad=True) for values in (CHOSEN, REJECTED, REFERENCE_CHOSEN, CHOSEN)]
    assert torch.autograd.gradcheck(lambda *x: dpo(*x, beta=0.1).losses, inputs)
    for loss_type in ("sigmoid", "hinge"):
        # the first pair is in the hinge's slope, the second in its flat part
        pair = [float64([-1.0, -0.5], requires_grad=True), float64([-1.1, -3.0], requires_grad=True)]
        assert torch.autograd.gradcheck(
            lambda c, r, kind=loss_type: simpo(c, r, beta=2.0, gamma_beta_ratio=0.5, loss_type=kind).losses, pair
        )


def test_a_huge_margin_stays_finite():
    result = dpo(*(torch.tensor([x]) for x in (-1e4, 0.0, 0.0, -1e4)), beta=1.0)
    assert result.losses.item() == pytest.approx(2e4)


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="'square'"):
        simpo(float64([0.0]), float64([0.0]), beta=1.0, gamma_beta_ratio=0.5, loss_type="square")
