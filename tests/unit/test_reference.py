"""The reference model of a learner rank, kept in host memory between two askings."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from small_folders import save_model

from oatlite.models import PairModel, load_policy
from oatlite.workers.reference import ReferenceModel


@pytest.fixture
def model(tmp_path: Path) -> PairModel:
    return PairModel(load_policy(save_model(tmp_path / "model"), torch.float32))


def places(model: PairModel) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def test_offloaded_weights_are_copied_for_as_long_as_they_are_at_hand(model: PairModel) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    reference = ReferenceModel(model, torch.device("cpu"), is_offloaded=True)
    at_home = places(model)
    for _ in range(2):
        with reference.at_hand():
            assert not set(places(model)) & set(at_home)
            assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        assert places(model) == at_home
    with suppress(KeyError), reference.at_hand():
        raise KeyError
    assert places(model) == at_home, "whatever happens meanwhile"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_without_offloading_they_stay_there(model: PairModel) -> None:
    reference = ReferenceModel(model, torch.device("cpu"), is_offloaded=False)
    there = places(model)
    with reference.at_hand():
        assert places(model) == there
