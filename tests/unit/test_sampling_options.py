"""The settings of a draw: from a configuration, greedy, and through the file that a sampling process reads."""

from __future__ import annotations

from oatlite.config.schema import SamplingConfig
from oatlite.inference.job import Sampling
from oatlite.sampling import SamplingOptions

CONFIG = SamplingConfig(temperature=0.5, top_p=0.9, top_k=3, max_new_tokens=6)


def test_they_are_those_of_the_configuration() -> None:
    options = SamplingOptions.of(CONFIG)
    assert options == SamplingOptions(temperature=0.5, top_p=0.9, top_k=3, max_new_tokens=6)
    assert not options.is_greedy


def test_greedy_keeps_the_length_alone() -> None:
    options = SamplingOptions.of(CONFIG, is_greedy=True)
    assert options == SamplingOptions(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=6)
    assert options.is_greedy


def test_they_come_out_of_a_job_as_they_went_in() -> None:
    sampling = Sampling(options=SamplingOptions.of(CONFIG), num_samples=2, purpose=1)
    assert Sampling.model_validate_json(sampling.model_dump_json()) == sampling
