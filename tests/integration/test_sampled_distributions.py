"""Responses of the reference and of mixtures, counted against their analytic distributions in a real actor process."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES
from one_actor import one_actor
from runs import Inputs
from small_folders import save_model

from oatlite.lora import all_parameters
from oatlite.models import load_policy, save_policy
from oatlite.samplers import SAMPLERS, coefficients
from oatlite.sampling import SamplingOptions
from oatlite.weights import plan_layout
from oatlite.workers.rollout import ActorPool

VOCAB = 12
EOS = 0
WEIGHT = 0.5
TEMPERATURE = 0.8
MAX_NEW_TOKENS = 3
PROMPT_LENGTHS = (2, 17, 130)  # the last one fills a block of the engine's prefix cache
COUNTED = ("reference", "mixture-plus", "mixture-minus")
REPEATS, EACH, CALLS = 120, 3, 10
LEAST_EXPECTED = 5.0
EVERYTHING = f"{Path(__file__).with_name('sampler_plan.py')}:Everything"
GREEDY = SamplingOptions(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=8)
RANDOM = SamplingOptions(temperature=TEMPERATURE, top_p=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS)


class Two:
    """A policy and a reference that is not far from it, and what both say about the next token."""

    def __init__(self, folder: Path) -> None:
        self.path, self.reference_path = folder / "policy", folder / "reference"
        save_model(self.path, seed=5, vocab_size=VOCAB, **SIZES)
        self.policy = load_policy(str(self.path), torch.float32).eval()
        self.move(0.08, seed=3)
        save_policy(self.policy, self.policy.state_dict(), str(self.path), self.reference_path)
        self.policy, self.reference = (
            load_policy(str(path), torch.float32).eval() for path in (self.path, self.reference_path)
        )

    def move(self, size: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter += size * torch.randn(parameter.shape, generator=generator)

    @contextmanager
    def source(self, names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        yield lambda name: self.policy.get_parameter(name).data

    def logprobs(self, texts: list[list[int]]) -> dict[str, torch.Tensor]:
        """By sampler: log-probabilities (R, V) at temperature 1 of what follows texts of one length."""
        with torch.no_grad():
            policy, reference = (
                torch.cat([model(input_ids=part).logits[:, -1].double() for part in torch.tensor(texts).split(64)])
                for model in (self.policy, self.reference)
            )
        policy, reference = policy.log_softmax(-1), reference.log_softmax(-1)
        mixed = {name: coefficients(name, WEIGHT) for name in SAMPLERS}
        return {name: (a * policy + b * reference).log_softmax(-1) for name, (a, b) in mixed.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    return Two(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def pool(two: Two, llama: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActorPool]:
    folder = tmp_path_factory.mktemp("actor")
    published = all_parameters(two.policy)
    layout = plan_layout([(name, one.shape) for name, one in published.items()], torch.float32, 60_000)
    longest = max(PROMPT_LENGTHS) + GREEDY.max_new_tokens
    more = {
        "algorithm": {"name": EVERYTHING},
        "sampling": {"mixture_weight": WEIGHT},
        "model": {"reference": str(two.reference_path)},
    }
    with one_actor(two.path, llama.reward_model, layout, VOCAB, folder, max_model_len=longest, more=more) as pool:
        yield pool


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, VOCAB, length).astype(np.int32) for length in PROMPT_LENGTHS]


def test_a_sync_moves_the_policy_and_not_the_reference_and_a_swap_changes_nothing(pool: ActorPool, two: Two) -> None:
    texts = prompts()
    seeds = np.zeros((len(texts), 1), np.uint64)

    def tokens(sampler: str) -> list[list[int]]:
        found, _ = pool.generate(texts, seeds, [[sampler]] * len(texts), GREEDY)
        return [candidates[0].tokens.tolist() for candidates in found]

    assert pool.policy_version == 0, "no sync has been"
    policy, reference = tokens("policy"), tokens("reference")
    assert tokens("policy") == policy != reference
    assert tokens("reference") == reference
    for name, found in (("policy", policy), ("reference", reference)):
        for text, row in zip(texts, found, strict=True):
            assert row[0] == int(two.logprobs([text.tolist()])[name][0].argmax())
    two.move(0.05, seed=10)
    pool.sync(1, two.source)
    assert tokens("reference") == reference
    moved = tokens("policy")
    assert moved != policy
    assert tokens("policy") == moved
    for text, row in zip(texts, moved, strict=True):
        assert row[0] == int(two.logprobs([text.tolist()])["policy"][0].argmax())


Context = tuple[int, tuple[int, ...]]


def deviation(counts: dict[Context, Counter[int]], expected: dict[Context, np.ndarray]) -> float:
    """How many standard deviations the chi-squared statistic of all contexts together lies above its mean, with the
    rare tokens of a context in one cell."""
    statistic, freedom = 0.0, 0
    for context, found in counts.items():
        total = found.total()
        mean = total * expected[context]
        is_rare = mean < LEAST_EXPECTED
        observed = np.array([found[token] for token in range(VOCAB)], float)
        cells = list(zip(observed[~is_rare], mean[~is_rare], strict=True))
        if mean[is_rare].sum() >= LEAST_EXPECTED:
            cells.append((observed[is_rare].sum(), mean[is_rare].sum()))
        elif cells and is_rare.any():
            smallest = min(range(len(cells)), key=lambda i: cells[i][1])
            cells[smallest] = (
                cells[smallest][0] + observed[is_rare].sum(), cells[smallest][1] + mean[is_rare].sum()
            )  # fmt: skip
        if len(cells) < 2:
            continue
        statistic += sum((one - other) ** 2 / other for one, other in cells)
        freedom += len(cells) - 1
    assert freedom > 80
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_tokens_are_counted_as_often_as_their_distributions_say(pool: ActorPool, two: Two) -> None:
    texts = prompts() * REPEATS  # side by side in the engine's batches
    samplers = [name for name in COUNTED for _ in range(EACH)]
    counts: dict[str, dict[Context, Counter[int]]] = {name: {} for name in COUNTED}
    reported: dict[str, dict[tuple[Context, int], float]] = {name: {} for name in COUNTED}
    start = time.perf_counter()
    for call in range(CALLS):
        seeds = np.random.default_rng(call).integers(0, 2**62, (len(texts), len(samplers))).astype(np.uint64)
        found, _ = pool.generate(texts, seeds, [samplers] * len(texts), RANDOM)
        for m, candidates in enumerate(found):
            for candidate in candidates:
                tokens = candidate.tokens.tolist()
                for t, token in enumerate(tokens):
                    context = (m % len(PROMPT_LENGTHS), tuple(tokens[:t]))
                    counts[candidate.sampler].setdefault(context, Counter())[token] += 1
                    reported[candidate.sampler][context, token] = float(candidate.logprobs[t])
    print(f"sampled in {time.perf_counter() - start:.1f} s")
    logprobs: dict[str, dict[Context, torch.Tensor]] = {name: {} for name in SAMPLERS}
    contexts = sorted({context for one in counts.values() for context in one}, key=lambda c: (c[0], len(c[1]), c))
    for m in range(len(PROMPT_LENGTHS)):
        for t in range(MAX_NEW_TOKENS):
            alike = [context for context in contexts if context[0] == m and len(context[1]) == t]
            for name, rows in two.logprobs([[*texts[m].tolist(), *tokens] for _, tokens in alike]).items():
                logprobs[name] |= dict(zip(alike, rows, strict=True))
    probabilities = {
        name: {context: (row / TEMPERATURE).softmax(-1).numpy() for context, row in rows.items()}
        for name, rows in logprobs.items()
    }
    for name in COUNTED:
        assert sum(found.total() for found in counts[name].values()) >= 30_000
        for other in SAMPLERS:
            far = deviation(counts[name], probabilities[other])
            print(name, "against", other, round(far, 2))
            assert far < 4 if other == name else far > 20, (name, other)
        for (context, token), value in reported[name].items():
            assert value == pytest.approx(float(logprobs[name][context][token]), abs=2e-3)


def test_a_sample_does_not_depend_on_what_else_is_in_its_request(pool: ActorPool) -> None:
    texts = prompts()
    seeds = np.arange(len(texts) * len(SAMPLERS), dtype=np.uint64).reshape(len(texts), -1) + np.uint64(100)
    samplers = [[SAMPLERS[m - n] for n in range(len(SAMPLERS))] for m in range(len(texts))]  # by prompt another order
    together, _ = pool.generate(texts, seeds, samplers, RANDOM)
    for m, text in enumerate(texts):
        for n, sampler in enumerate(samplers[m]):
            [[alone]], _ = pool.generate([text], seeds[m : m + 1, n : n + 1].copy(), [[sampler]], RANDOM)
            assert together[m][n].sampler == alone.sampler == sampler
            assert together[m][n].tokens.tolist() == alone.tokens.tolist()
            assert together[m][n].logprobs == pytest.approx(alone.logprobs, abs=1e-4)
