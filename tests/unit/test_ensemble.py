"""The epistemic reward head: equal to its members one by one, spread where nothing was seen, and right where it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from oatlite.epistemic import load_head, save_head
from oatlite.maths.ensemble import EpistemicHead, head_loss


def trained(head: EpistemicHead, chosen: torch.Tensor, rejected: torch.Tensor, *, pull: float) -> EpistemicHead:
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        head_loss(head, chosen, rejected, pull=pull).backward()
        optimizer.step()
    return head


def test_the_ensemble_is_its_members_one_by_one() -> None:
    head = EpistemicHead(6, num_members=3, hidden_size=5, seed=1)
    features = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0))
    rewards = head(features)
    assert rewards.shape == (3, 4, 2)
    for e in range(3):
        hidden = features
        for i, (weight, bias) in enumerate(zip(head.weights, head.biases, strict=True)):
            hidden = hidden @ weight[e] + bias[e, 0]
            hidden = hidden.clamp(min=0) if i < 2 else hidden
        assert torch.allclose(rewards[e], hidden[..., 0], atol=1e-6)


def test_members_start_apart_within_two_deviations_and_by_the_seed() -> None:
    head, same, other = (EpistemicHead(64, seed=seed) for seed in (0, 0, 1))
    first = head.weights[0].detach()
    assert first.shape == (20, 64, 128)
    assert float(first.abs().max()) <= 2 / (2 * 8) + 1e-6
    assert float(first.std()) == pytest.approx(0.88 / (2 * 8), rel=0.02)  # of a normal one cut at two deviations
    assert all(float(bias.abs().max()) == 0 for bias in head.biases)
    assert torch.equal(first, same.weights[0]) and not torch.equal(first, other.weights[0])
    assert not torch.allclose(first[0], first[1])


def test_the_loss_is_its_definition() -> None:
    head = EpistemicHead(3, num_members=2, hidden_size=4)
    chosen, rejected = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert float(head.regularization()) == 0
    with torch.no_grad():
        head.weights[1][1] += 0.5
        head.biases[0][0] -= 1
    count = sum(parameter.numel() for parameter in head.parameters())
    assert count == 2 * (3 * 4 + 4 + 4 * 4 + 4 + 4 + 1)
    assert float(head.regularization()) == pytest.approx((16 * 0.25 + 4 * 1) / count)
    margins = head(chosen) - head(rejected)
    expected = torch.log1p((-margins).exp()).mean() + 0.3 * head.regularization()
    assert float(head_loss(head, chosen, rejected, pull=0.3)) == pytest.approx(float(expected), rel=1e-5)


def test_it_learns_what_it_saw_and_stays_unsure_of_what_it_did_not() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(8, generator=generator)
    points = torch.randn(400, 2, 8, generator=generator)
    points[..., 4:] = 0  # half of the features never vary in training
    wins = (points @ direction).argmax(1)
    rows = torch.arange(400)
    head = trained(EpistemicHead(8, seed=3), points[rows, wins], points[rows, 1 - wins], pull=0.1)
    fresh = torch.randn(500, 2, 8, generator=generator)
    seen = fresh.clone()
    seen[..., 4:] = 0
    right = ((seen @ direction)[:, 0] > (seen @ direction)[:, 1]) == (
        head(seen).mean(0)[:, 0] > head(seen).mean(0)[:, 1]
    )
    assert float(right.float().mean()) > 0.95

    def unsure(points: torch.Tensor) -> float:
        """Members' spread, beside the size of what they say."""
        margins = head(points)[..., 0] - head(points)[..., 1]
        return float(margins.std(0).mean() / margins.abs().mean())

    assert unsure(fresh - seen) > 2 * unsure(seen)


def test_a_strong_pull_keeps_it_where_it_began() -> None:
    chosen, rejected = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    loose, tight = (trained(EpistemicHead(8), chosen, rejected, pull=pull) for pull in (0.0, 1e4))
    assert float(tight.regularization()) < 0.05 * float(loose.regularization())


def test_a_saved_head_is_whole_again_with_its_initialization() -> None:
    chosen, rejected = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    head = trained(EpistemicHead(8, seed=1), chosen, rejected, pull=0.1)
    again = EpistemicHead(8, seed=2)
    again.load_state_dict(copy.deepcopy(head.state_dict()))
    assert torch.equal(again(chosen), head(chosen))
    assert float(again.regularization()) == float(head.regularization()) > 0


def test_a_head_as_a_folder(tmp_path: Path) -> None:
    head = EpistemicHead(5, num_members=3, hidden_size=7, seed=9)
    save_head(tmp_path, head, encoder="somebody/encoder")
    again = load_head(tmp_path)
    features = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(features), head(features)) and torch.equal(again.regularization(), head.regularization())
    assert json.loads((tmp_path / "head.json").read_text())["encoder"] == "somebody/encoder"
