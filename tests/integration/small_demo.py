"""The demo at a hundredth of its size: the same task, a policy and a reward model of one layer."""

from __future__ import annotations

from oatlite.demo.build import Recipe

SMALL_DEMO = Recipe(num_train=64, num_test=8, hidden_size=64, num_layers=1, policy_rows=60, reward_posts=20)
