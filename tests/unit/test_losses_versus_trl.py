"""Losses against TRL's own trainers: on the same pairs and networks, each side by its own forward pass.

TRL averages over a batch before it gives anything out, so each pair goes to it alone, and its loss is the pair's. Both
sides count EOS among a response's tokens and leave the prompt and padding out. The networks are in float64, and TRL's
log-probabilities in float32 all the same. What the two do differently:

- ``ipo``: TRL's DPO trainer averages log-ratios over tokens in the loss, as oatlite does, and sums them in the rewards
  that it logs. Its online DPO trainer sums in both.
- ``cdpo``: TRL's ``sigmoid`` knows no label smoothing any more. ``aot`` has cDPO's formula on sorted margins, and there
  is nothing to sort in a pair. Its ``robust`` takes away what cDPO adds, and is another loss.
- ``kl`` and ``rev_kl``: TRL's labels are as sure for one pair as for another, ``exo_pair`` and again ``aot`` with a
  label smoothing of e; oatlite's are as sure as the oracle's margins, which are log((1 - e) / e) then.
- ``dpo_sft``: TRL's ``sft`` is a mean over the tokens of a batch, oatlite's over those of each response.
- ``simpo``: TRL names the margin itself (``simpo_gamma``), oatlite its ratio to beta; TRL's ``hinge`` has no margin and
  sums, so it is given averages here, and compared at a margin of 0.
- ``kto``: TRL judges examples one by one and takes the mean over a batch; the two of a pair make a batch here.

TRL has no ``lr_dpo``, ``dpo_positive`` and ``bnf``, and no ``xpo`` any more.
"""

import math

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from small_folders import byte_tokenizer, config_of
from transformers import AutoModelForCausalLM
from trl.experimental import cpo

from oatlite.algorithms.base import averages, sums
from oatlite.layouts import TokenPair, lay_out
from oatlite.maths import losses
from oatlite.maths.pairs import ResponseLogprobs
from oatlite.models import PairModel

PAIRS = [
    ("How long?", " Very, so.", " Not."),
    ("Say it", " no", " a longer one"),
    ("?", " as long", " as this"),
    ("A prompt of some more words than the others", " short", " shorter"),
]
SMOOTHING = 0.2
MARGIN = math.log((1 - SMOOTHING) / SMOOTHING)
PAD = 2
CPU = torch.device("cpu")


def network(seed):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_of("llama")).double().eval()


def settings(folder):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
    }


def preferences():
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])


def dpo_trainer(folder, **options):
    return trl.DPOTrainer(
        model=network(0),
        ref_model=network(1),
        args=trl.DPOConfig(**settings(folder), **options),
        train_dataset=preferences(),
        processing_class=byte_tokenizer(),
    )


def dpo_verdict(trainer, row):
    """The loss and the implicit rewards that TRL finds for one pair."""
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
    logged = trainer._metrics["eval"]
    return loss.item(), logged["rewards/chosen"][-1], logged["rewards/rejected"][-1]


def dpo_verdicts(trainer):
    return torch.tensor([dpo_verdict(trainer, row) for row in trainer.train_dataset], dtype=torch.float64).T


def token_pairs():
    """The pairs as oatlite would hold them after generation: a response ends in EOS."""
    tokenizer = byte_tokenizer()

    def tokens(text):
        return tokenizer(text, return_tensors="np")["input_ids"][0].astype("int32")

    return [TokenPair(prompt=tokens(p), chosen=tokens(f"{c}<eos>"), rejected=tokens(f"{r}<eos>")) for p, c, r in PAIRS]


def responses(seed, pairs=None):
    """Log-probabilities of ``pairs`` under the network of ``seed``, by oatlite's own forward pass."""
    batch = lay_out(pairs or token_pairs(), "shared", PAD, CPU)
    with torch.no_grad():
        logprobs = PairModel(network(seed))(batch)
    return ResponseLogprobs.from_tokens(logprobs, batch.segments, batch.num_pairs)


def summed(logprobs):
    return torch.cat([logprobs.chosen, logprobs.rejected])


@pytest.fixture(scope="module")
def policy():
    return responses(0)


@pytest.fixture(scope="module")
def reference():
    return responses(1)


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def check(result, verdicts):
    for found, expected in zip(result, verdicts, strict=True):
        assert len(set(expected.tolist())) > 1, "pairs that differ"
        agree(found, expected)


def test_both_read_the_same_tokens(tmp_path):
    for ours, theirs in zip(token_pairs(), dpo_trainer(tmp_path).train_dataset, strict=True):
        assert ours.prompt.tolist() == theirs["prompt_ids"]
        assert ours.chosen.tolist() == theirs["chosen_ids"]
        assert ours.rejected.tolist() == theirs["rejected_ids"]


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(("loss_type", "loss"), [("sigmoid", losses.dpo), ("hinge", losses.slic)], ids=["dpo", "slic"])
def test_dpo_and_slic(tmp_path, policy, reference, loss_type, loss, beta):
    verdicts = dpo_verdicts(dpo_trainer(tmp_path, loss_type=loss_type, beta=beta))
    check(loss(*sums(policy, reference), beta=beta), verdicts)


def test_ipo_averages_over_tokens(tmp_path, policy, reference):
    found, chosen, rejected = dpo_verdicts(dpo_trainer(tmp_path, loss_type="ipo", beta=0.3))
    result = losses.ipo(*averages(policy, reference), beta=0.3)
    check(result, (found, chosen / policy.chosen_lengths, rejected / policy.rejected_lengths))


def test_cdpo(tmp_path, policy, reference):
    verdicts = dpo_verdicts(dpo_trainer(tmp_path, loss_type="aot", beta=0.3, label_smoothing=SMOOTHING))
    check(losses.cdpo(*sums(policy, reference), beta=0.3, label_smoothing=SMOOTHING), verdicts)


def test_robust_takes_away_what_cdpo_adds(tmp_path, policy, reference):
    robust, *_ = dpo_verdicts(dpo_trainer(tmp_path, loss_type="robust", beta=0.3, label_smoothing=SMOOTHING))
    right = losses.dpo(*sums(policy, reference), beta=0.3).losses
    c, r, c0, r0 = sums(policy, reference)
    flipped = losses.dpo(r, c, r0, c0, beta=0.3).losses
    conservative = losses.cdpo(c, r, c0, r0, beta=0.3, label_smoothing=SMOOTHING).losses
    agree(conservative, (1 - SMOOTHING) * right + SMOOTHING * flipped)
    agree(robust * (1 - 2 * SMOOTHING), (1 - SMOOTHING) * right - SMOOTHING * flipped)


@pytest.mark.parametrize(("loss_type", "loss"), [("exo_pair", losses.kl), ("aot", losses.rev_kl)], ids=["kl", "rev_kl"])
def test_kl_in_both_directions(tmp_path, policy, reference, loss_type, loss):
    verdicts = dpo_verdicts(dpo_trainer(tmp_path, loss_type=loss_type, beta=0.3, label_smoothing=SMOOTHING))
    margins = torch.full((len(PAIRS),), MARGIN, dtype=torch.float64)
    check(loss(*sums(policy, reference), beta=0.3, margins=margins), verdicts)


def test_dpo_sft(tmp_path, policy, reference):
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.3}
    verdicts = dpo_verdicts(dpo_trainer(tmp_path, **options))
    result = losses.dpo_sft(*sums(policy, reference), beta=0.3, sft_weight=0.5, chosen_lengths=policy.chosen_lengths)
    check(result, verdicts)


def cpo_trainer(folder, **options):
    return cpo.CPOTrainer(
        model=network(0),
        args=cpo.CPOConfig(**settings(folder), cpo_alpha=0.0, **options),
        train_dataset=preferences(),
        processing_class=byte_tokenizer(),
    )


def test_simpo(tmp_path, policy):
    trainer = cpo_trainer(tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=1.4)
    verdicts = []
    for row in trainer.train_dataset:
        loss, logged = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator([row]))
        verdicts.append((loss.item(), logged["rewards/chosen"], logged["rewards/rejected"]))
    result = losses.simpo(
        policy.chosen / policy.chosen_lengths,
        policy.rejected / policy.rejected_lengths,
        beta=2.0,
        gamma_beta_ratio=0.7,
    )
    check(result, torch.tensor(verdicts, dtype=torch.float64).T)


def test_hinge_of_simpo(tmp_path, policy):
    chosen, rejected = policy.chosen / policy.chosen_lengths, policy.rejected / policy.rejected_lengths
    verdicts = cpo_trainer(tmp_path, loss_type="hinge", beta=2.0).cpo_loss(chosen, rejected)
    check(losses.simpo(chosen, rejected, beta=2.0, gamma_beta_ratio=0.0, loss_type="hinge"), verdicts)


def test_kto(tmp_path, policy, reference):
    sides = [{"prompt": p, "completion": text, "label": text is c} for p, c, r in PAIRS for text in (c, r)]
    weights = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    trainer = trl.KTOTrainer(
        model=network(0),
        ref_model=network(1),
        args=trl.KTOConfig(**settings(tmp_path), **weights, per_device_train_batch_size=len(sides)),
        train_dataset=Dataset.from_list(sides),
        processing_class=byte_tokenizer(),
    )
    rows = list(trainer.train_dataset)
    origins = []
    for b, pair in enumerate(zip(rows[0::2], rows[1::2], strict=True)):
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(pair)).item()
        logged = trainer._metrics["eval"]
        origins.append(logged["kl"][-1])
        foreign = [np.array(row["KL_completion_ids"], np.int32) for row in pair]
        crossed = [TokenPair(prompt=token_pairs()[b].prompt, chosen=foreign[0], rejected=foreign[1])]
        policy_kl, reference_kl = (summed(responses(seed, crossed)) for seed in (0, 1))
        result = losses.kto(
            *(side[b : b + 1] for side in sums(policy, reference)),
            **weights,
            policy_kl=policy_kl,
            reference_kl=reference_kl,
        )
        rewards = [logged[f"rewards/{side}"][-1] for side in ("chosen", "rejected")]
        agree(torch.cat(result), torch.tensor([loss, *rewards], dtype=torch.float64))
    assert min(origins) == 0 < max(origins), "both sides of the clamp"
