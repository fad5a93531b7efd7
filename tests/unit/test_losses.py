"""Losses against an independent evaluation of their papers' formulas, number by number in Python's float64."""

import math

import pytest
import torch

from oatlite.maths import losses
from oatlite.maths.losses import dpo, simpo

CHOSEN = [-12.5, -3.25, -40.0, 0.0, -700.0]
REJECTED = [-11.0, -9.5, -40.0, -55.0, -1.0]
REFERENCE_CHOSEN = [-13.0, -3.0, -41.5, -0.5, -650.0]
REFERENCE_REJECTED = [-10.0, -9.0, -38.0, -60.0, -2.0]
FOUR = (CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)
LENGTHS = ([10.0, 4.0, 31.0, 1.0, 300.0], [12.0, 9.0, 31.0, 40.0, 2.0])
MARGINS = [0.5, 3.0, 0.0, 40.0, -2.0]
FOREIGN = ([-30.0, -12.0, -5.0], [-33.0, -14.5, -5.5])


def float64(values, requires_grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def negative_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x


def close(tensor, expected):
    assert tensor.dtype == torch.float64
    assert tensor.shape == (len(expected),)
    torch.testing.assert_close(tensor.detach(), float64(expected), rtol=1e-9, atol=1e-9)


def pairs():
    """(c, r, c0, r0) of each pair, as floats."""
    return list(zip(*FOUR, strict=True))


def check_rewards(result, beta):
    close(result.chosen_rewards, [beta * (c - c0) for c, _, c0, _ in pairs()])
    close(result.rejected_rewards, [beta * (r - r0) for _, r, _, r0 in pairs()])


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_dpo_is_equation_7(beta):
    result = dpo(*map(float64, FOUR), beta=beta)
    close(result.losses, [negative_log_sigmoid(beta * (c - c0) - beta * (r - r0)) for c, r, c0, r0 in pairs()])
    check_rewards(result, beta)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_cdpo_mixes_both_labels(smoothing):
    result = losses.cdpo(*map(float64, FOUR), beta=0.3, label_smoothing=smoothing)
    expected = []
    for c, r, c0, r0 in pairs():
        logit = 0.3 * (c - c0) - 0.3 * (r - r0)
        expected.append((1 - smoothing) * negative_log_sigmoid(logit) + smoothing * negative_log_sigmoid(-logit))
    close(result.losses, expected)
    check_rewards(result, 0.3)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_ipo_is_equation_17(beta):
    result = losses.ipo(*map(float64, FOUR), beta=beta)
    close(result.losses, [((c - c0) - (r - r0) - 0.5 / beta) ** 2 for c, r, c0, r0 in pairs()])
    check_rewards(result, beta)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_slic_is_a_hinge(beta):
    result = losses.slic(*map(float64, FOUR), beta=beta)
    close(result.losses, [max(0.0, 1 - beta * (c - c0) + beta * (r - r0)) for c, r, c0, r0 in pairs()])
    assert 0 < sum(loss == 0 for loss in result.losses.tolist()) < len(CHOSEN)
    check_rewards(result, beta)


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


@pytest.mark.parametrize("alpha", [0.0, 0.02, 1.0])
def test_lr_dpo_is_equation_9(alpha):
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), map(float64, LENGTHS), strict=True))
    result = losses.lr_dpo(*map(float64, FOUR), beta=0.1, length_alpha=alpha, **lengths)
    expected = [
        negative_log_sigmoid(0.1 * ((c - c0) - (r - r0)) + alpha * n - alpha * m)
        for (c, r, c0, r0), n, m in zip(pairs(), *LENGTHS, strict=True)
    ]
    close(result.losses, expected)
    check_rewards(result, 0.1)


@pytest.mark.parametrize("positive_lambda", [0.0, 0.5, 50.0])
def test_dpo_positive_is_equation_3(positive_lambda):
    result = losses.dpo_positive(*map(float64, FOUR), beta=0.3, positive_lambda=positive_lambda)
    expected = [
        negative_log_sigmoid(0.3 * ((c - c0) - (r - r0) - positive_lambda * max(0.0, c0 - c)))
        for c, r, c0, r0 in pairs()
    ]
    close(result.losses, expected)
    check_rewards(result, 0.3)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_dpo_sft_adds_the_likelihood_of_a_token(weight):
    result = losses.dpo_sft(*map(float64, FOUR), beta=0.1, sft_weight=weight, chosen_lengths=float64(LENGTHS[0]))
    expected = [
        negative_log_sigmoid(0.1 * ((c - c0) - (r - r0))) - weight * c / n
        for (c, r, c0, r0), n in zip(pairs(), LENGTHS[0], strict=True)
    ]
    close(result.losses, expected)
    check_rewards(result, 0.1)


@pytest.mark.parametrize("alpha", [0.0, 5e-6, 0.3])
def test_xpo_adds_the_likelihood_of_what_the_reference_sampled(alpha):
    from_reference = [(True, False), (False, True), (False, True), (True, False), (False, False)]
    chosen, rejected = (torch.tensor(side) for side in zip(*from_reference, strict=True))
    result = losses.xpo(
        *map(float64, FOUR), beta=0.1, alpha=alpha, chosen_is_reference=chosen, rejected_is_reference=rejected
    )
    expected = [
        negative_log_sigmoid(0.1 * ((c - c0) - (r - r0))) + alpha * (c if is_c else r if is_r else 0.0)
        for (c, r, c0, r0), (is_c, is_r) in zip(pairs(), from_reference, strict=True)
    ]
    close(result.losses, expected)
    check_rewards(result, 0.1)


@pytest.mark.parametrize("foreign", [FOREIGN, FOREIGN[::-1]], ids=["diverged", "clamped"])
def test_kto_is_the_mean_of_two_values(foreign):
    policy_kl, reference_kl = foreign
    origin = max(0.0, sum(p - q for p, q in zip(policy_kl, reference_kl, strict=True)) / 3)
    result = losses.kto(
        *map(float64, FOUR),
        beta=0.1,
        policy_kl=float64(policy_kl),
        reference_kl=float64(reference_kl),
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    expected = [
        (1.5 * (1 - sigmoid(0.1 * (c - c0 - origin))) + 0.5 * (1 - sigmoid(0.1 * (origin - (r - r0))))) / 2
        for c, r, c0, r0 in pairs()
    ]
    close(result.losses, expected)
    check_rewards(result, 0.1)


def test_kto_gives_its_reference_point_no_gradient():
    policy_kl = float64([-1.0], requires_grad=True)
    four = [float64(values, requires_grad=True) for values in FOUR]
    losses.kto(*four, beta=0.1, policy_kl=policy_kl, reference_kl=float64([-3.0])).losses.sum().backward()
    assert policy_kl.grad is None


def test_kl_is_the_divergence_of_two_coins():
    result = losses.kl(*map(float64, FOUR), beta=0.1, margins=float64(MARGINS))
    expected = []
    for (c, r, c0, r0), margin in zip(pairs(), MARGINS, strict=True):
        q, p = sigmoid(0.1 * ((c - c0) - (r - r0))), sigmoid(margin)
        wins, loses = q * math.log(q / p), (1 - q) * (math.log(1 - q) + negative_log_sigmoid(-margin))
        expected.append(wins + loses)
    close(result.losses, expected)
    check_rewards(result, 0.1)


def test_rev_kl_is_the_cross_entropy_of_two_coins():
    result = losses.rev_kl(*map(float64, FOUR), beta=0.1, margins=float64(MARGINS))
    expected = []
    for (c, r, c0, r0), margin in zip(pairs(), MARGINS, strict=True):
        logit, p = 0.1 * ((c - c0) - (r - r0)), sigmoid(margin)
        expected.append(p * negative_log_sigmoid(logit) + (1 - p) * negative_log_sigmoid(-logit))
    close(result.losses, expected)
    check_rewards(result, 0.1)


def test_both_kl_losses_are_stationary_where_policy_and_oracle_agree():
    """And nowhere else: that is what sets them apart from DPO."""
    for loss in (losses.kl, losses.rev_kl):
        chosen = float64([3.0, 4.0], requires_grad=True)
        zeros = [torch.zeros(2, dtype=torch.float64) for _ in range(3)]
        loss(chosen, *zeros, beta=0.5, margins=float64([1.5, 1.5])).losses.sum().backward()
        assert abs(chosen.grad[0]) < 1e-12 < chosen.grad[1]


# --------------------------------------------------------------------------- BNF, over whole distributions


def bnf_by_definition(logits, reference, tokens, lengths):
    """Cross-entropy with the soft target, from a policy's logits (T, V) and a reference's log-probabilities (T,)."""
    value = torch.zeros((), dtype=torch.float64)
    for t in range(lengths):
        logprobs = logits[t].log_softmax(-1)
        fixed = logprobs.detach().exp()
        y = tokens[t]
        target = min(float(fixed[y]) / (math.exp(float(reference[t])) + 1e-6), 1.0)
        others = (1 - target + 1e-6) / (1 - float(fixed[y]) + 1e-6)
        weights = [target if v == y else others * float(fixed[v]) for v in range(logits.shape[1])]
        value = value + (float64(weights) * logprobs).sum()
    return value


def test_bnf_is_a_soft_cross_entropy_over_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    sizes, vocabulary = [(3, 5), (4, 2)], 7
    expected, arguments, leaves = [], {}, []
    sides = {"chosen": 5, "rejected": 6}  # as much padding as there is room for
    for side, longest in sides.items():
        logits = torch.randn(2, longest, vocabulary, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()
        reference = torch.randn(2, longest, vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1)
        tokens = torch.randint(vocabulary, (2, longest), generator=generator)
        arguments[side] = (logits, reference.gather(-1, tokens[..., None])[..., 0], tokens)
        leaves.append(logits)
    for b, (n, m) in enumerate(sizes):
        chosen, rejected = (
            bnf_by_definition(*(part[b] for part in arguments[side]), length)
            for side, length in zip(sides, (n, m), strict=True)
        )
        expected.append((rejected - chosen) / min(n, m))

    tokenwise, masks, entropies = {}, {}, {}
    for (side, longest), column in zip(sides.items(), (0, 1), strict=True):
        logits, _, tokens = arguments[side]
        logprobs = logits.log_softmax(-1)
        tokenwise[side] = logprobs.gather(-1, tokens[..., None])[..., 0]
        entropies[side] = -(logprobs.exp() * logprobs).sum(-1)
        masks[side] = (torch.arange(longest) < torch.tensor([[size[column]] for size in sizes])).double()
    result = losses.bnf(
        tokenwise["chosen"],
        tokenwise["rejected"],
        arguments["chosen"][1],
        arguments["rejected"][1],
        chosen_entropies=entropies["chosen"],
        rejected_entropies=entropies["rejected"],
        chosen_masks=masks["chosen"],
        rejected_masks=masks["rejected"],
    )
    torch.testing.assert_close(result.losses, torch.stack(expected), rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(
        torch.autograd.grad(result.losses.sum(), leaves, retain_graph=True),
        torch.autograd.grad(torch.stack(expected).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    ratios = ((tokenwise["chosen"] - arguments["chosen"][1]) * masks["chosen"]).sum(-1)
    close(result.chosen_rewards, ratios.tolist())


# --------------------------------------------------------------------------- what all have in common


def extras(name):
    """The arguments that a loss wants beside the log-probabilities."""
    return {
        "dpo": {"beta": 0.5},
        "cdpo": {"beta": 0.5, "label_smoothing": 0.1},
        "ipo": {"beta": 0.5},
        "slic": {"beta": 0.5},
        "lr_dpo": {
            "beta": 0.5,
            "length_alpha": 0.1,
            "chosen_lengths": float64([3.0, 4.0]),
            "rejected_lengths": float64([5.0, 2.0]),
        },
        "dpo_positive": {"beta": 0.5, "positive_lambda": 5.0},
        "dpo_sft": {"beta": 0.5, "sft_weight": 1.0, "chosen_lengths": float64([3.0, 4.0])},
        "kto": {"beta": 0.5, "policy_kl": float64([-1.0]), "reference_kl": float64([-1.5])},
        "kl": {"beta": 0.5, "margins": float64([4.0, 4.0])},
        "rev_kl": {"beta": 0.5, "margins": float64([4.0, 4.0])},
        "xpo": {
            "beta": 0.5,
            "alpha": 0.05,
            "chosen_is_reference": torch.tensor([True, False]),
            "rejected_is_reference": torch.tensor([False, True]),
        },
    }[name]


WITH_REFERENCE = ["dpo", "cdpo", "ipo", "slic", "lr_dpo", "dpo_positive", "dpo_sft", "kto", "kl", "rev_kl", "xpo"]


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_losses_push_chosen_up_and_rejected_down(name):
    inputs = [float64([-2.0, -3.0], requires_grad=True) for _ in range(4)]
    result = getattr(losses, name)(*inputs, **extras(name))
    result.losses.sum().backward()
    assert (inputs[0].grad < 0).all()
    assert (inputs[1].grad > 0).all()
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_gradients_agree_with_finite_differences(name):
    inputs = [
        float64(values, requires_grad=True) for values in ([-2.0, -3.1], [-2.5, -2.2], [-1.9, -3.5], [-2.6, -2.0])
    ]
    arguments = extras(name)
    assert torch.autograd.gradcheck(lambda *x: getattr(losses, name)(*x, **arguments).losses, inputs)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_simpos_gradients_agree_with_finite_differences(loss_type):
    # the first pair is in the hinge's slope, the second in its flat part
    pair = [float64([-1.0, -0.5], requires_grad=True), float64([-1.1, -3.0], requires_grad=True)]
    assert torch.autograd.gradcheck(
        lambda c, r: simpo(c, r, beta=2.0, gamma_beta_ratio=0.5, loss_type=loss_type).losses, pair
    )
    result = simpo(*pair, beta=2.0, gamma_beta_ratio=0.5)
    assert result.losses.requires_grad and not result.chosen_rewards.requires_grad


@pytest.mark.parametrize("name", [name for name in WITH_REFERENCE if name != "ipo"])
def test_huge_margins_stay_finite(name):
    far = [torch.tensor([x, -x], requires_grad=True) for x in (-1e4, 0.0, 0.0, -1e4)]
    arguments = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in extras(name).items()}
    result = getattr(losses, name)(*far, **arguments)
    result.losses.sum().backward()
    assert torch.isfinite(result.losses).all()
    assert all(torch.isfinite(x.grad).all() for x in far)


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="'square'"):
        simpo(float64([0.0]), float64([0.0]), beta=1.0, gamma_beta_ratio=0.5, loss_type="square")
