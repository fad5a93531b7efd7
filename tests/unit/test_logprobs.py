"""Chunked log-probabilities against the plain computation: values, gradients, memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oatlite.maths.logprobs import mismatch, token_logprobs, truncated_importance

T, D, V = 23, 6, 41


def inputs(dtype, *, with_bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if with_bias else None
    targets = torch.randint(V, (T,), generator=generator)
    upstream = torch.randn(T, generator=generator, dtype=torch.float64)
    return hidden, weight, bias, targets, upstream


def plain(hidden, weight, bias, targets):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("chunk", [1, 5, T, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_the_plain_computation(chunk, with_bias):
    results = []
    for function in (plain, lambda *x: token_logprobs(*x, chunk=chunk)):
        hidden, weight, bias, targets, upstream = inputs(torch.float64, with_bias=with_bias)
        logprobs = function(hidden, weight, bias, targets)
        (logprobs * upstream).sum().backward()
        results.append([logprobs.detach(), hidden.grad, weight.grad, *([bias.grad] if with_bias else [])])
    assert len(results[0]) == 3 + with_bias
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    hidden, weight, bias, targets, _ = inputs(torch.float64)
    arguments = (hidden[:5], weight[:7], bias[:7], targets[:5] % 7)
    arguments = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in arguments)
    assert torch.autograd.gradcheck(lambda *x: token_logprobs(*x, chunk=2), arguments)


def test_bfloat16_is_normalized_in_float32():
    hidden, weight, bias, targets, upstream = inputs(torch.bfloat16)
    logprobs = token_logprobs(hidden, weight, bias, targets, chunk=4)
    assert logprobs.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-6)
    (logprobs * upstream.float()).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.bfloat16
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    (plain(*exact, targets) * upstream).sum().backward()
    for actual, expected in zip((hidden, weight, bias), exact, strict=True):
        torch.testing.assert_close(actual.grad.double(), expected.grad, rtol=0.05, atol=0.05)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, torch.Tensor):
                self.largest = max(self.largest, item.numel())
        return result


def test_the_logits_of_the_batch_never_exist_at_once():
    num_tokens, vocabulary, chunk = 300, 200, 10
    hidden = torch.randn(num_tokens, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    targets = torch.zeros(num_tokens, dtype=torch.long)
    sizes = {}
    for name, function in (("plain", plain), ("chunked", lambda *x: token_logprobs(*x, chunk=chunk))):
        with LargestTensor() as mode:
            function(hidden, weight, None, targets).sum().backward()
        sizes[name] = mode.largest
    assert sizes["plain"] == num_tokens * vocabulary
    assert sizes["chunked"] == chunk * vocabulary


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight, bias, targets, _ = inputs(torch.float32)
    weight.requires_grad_(False)
    token_logprobs(hidden, weight, bias, targets, chunk=4).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_no_tokens_are_no_tokens():
    hidden, weight, bias, targets, _ = inputs(torch.float32)
    logprobs = token_logprobs(hidden[:0], weight, bias, targets[:0], chunk=4)
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets"),
        ({"weight": torch.zeros(V, D + 1)}, "weight"),
        ({"bias": torch.zeros(V + 1)}, "bias"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(change, words):
    hidden, weight, bias, targets, _ = inputs(torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets, "chunk": 4} | change
    with pytest.raises(ValueError, match=words):
        token_logprobs(**arguments)


def test_mismatch_adds_up_over_ranks():
    sampler = torch.zeros(5)
    learner = torch.tensor([math.log(1.05), math.log(1.2), math.log(0.85), -0.05, 0.0])
    whole = mismatch(learner, sampler)
    assert whole["num_tokens"] == 5
    assert whole["num_outside"] == 2
    assert whole["abs_difference_max"] == pytest.approx(math.log(1.2), rel=1e-6)
    assert whole["abs_difference_sum"] == pytest.approx(learner.abs().sum().item(), rel=1e-6)
    parts = [mismatch(learner[:2], sampler[:2]), mismatch(learner[2:], sampler[2:]), mismatch(learner[:0], sampler[:0])]
    for key in ("num_tokens", "num_outside", "abs_difference_sum"):
        assert sum(part[key] for part in parts) == pytest.approx(whole[key])


def test_mismatch_counts_what_is_not_a_number_as_outside():
    assert mismatch(torch.tensor([float("nan"), -1.0]), torch.tensor([-1.0, -1.0]))["num_outside"] == 1


def test_importance_is_the_ratio_up_to_its_cap():
    ratios = torch.tensor([0.25, 1.0, 1.9, 2.1, 1e9], dtype=torch.float64)
    assert truncated_importance(ratios.log(), 2.0).tolist() == pytest.approx([0.25, 1.0, 1.9, 2.0, 2.0])
