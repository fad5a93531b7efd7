"""The models of a learner rank: its policy as it is loaded, sent and left behind, and the reference beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from oatlite.algorithms.base import Algorithm
from oatlite.config.schema import Config
from oatlite.data import load_tokenizer
from oatlite.epistemic import save_head
from oatlite.layout_choice import choose_layout
from oatlite.layouts import ForwardBatch
from oatlite.lora import (
    Published,
    adapter_of,
    adapter_off,
    adapter_parameters,
    add_adapter,
    all_parameters,
    merged_parameters,
    write_adapter,
)
from oatlite.maths.ensemble import EpistemicHead
from oatlite.models import PairModel, checkpoint_gradients, load_policy, save_policy
from oatlite.output_folder import complete_or_absent
from oatlite.trainer import Trainer
from oatlite.weights import DTYPES
from oatlite.workers.reference import ReferenceModel
from oatlite.workers.spec import WorkerSpec
from oatlite.workers.update import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPolicy:
    """The policy on its device with its tokenizer. ``published`` is what can be sent of it, by the ways of
    ``lora.sync``, and ``rows`` how pairs are laid out for it."""

    model: PairModel
    tokenizer: PreTrainedTokenizerBase
    published: Mapping[str, dict[str, Published]]
    rows: Layout

    @property
    def vocab_size(self) -> int:
        size: int = self.model.model.get_input_embeddings().num_embeddings
        return size


def load_learned(spec: WorkerSpec, device: torch.device) -> LearnedPolicy:
    """Load the policy, with its adapter if it is to have one, and find out how it takes pairs."""
    config = spec.config
    policy = PairModel(_load(config, config.model.path, device if config.lora.quantize != "none" else None))
    published = {"merged": all_parameters(policy.model)}
    adapter = adapter_of(config.lora)
    if adapter is not None:
        add_adapter(policy.model, adapter, config.run.seed)
        published = {"merged": merged_parameters(policy.model), "adapter": adapter_parameters(policy.model)}
    tokenizer = load_tokenizer(str(config.model.path), config.model.trust_remote_code)
    pad, longest = int(tokenizer.pad_token_id), (spec.longest_prompt, spec.longest_response)
    name = choose_layout(policy.to(device), len(tokenizer), pad, device, longest=longest)
    if config.learner.gradient_checkpointing:
        checkpoint_gradients(policy.model)
    rows = Layout(name=name, pad_token_id=pad, device=device)
    return LearnedPolicy(model=policy, tokenizer=tokenizer, published=published, rows=rows)


def _load(config: Config, path: str | None, quantized_on: torch.device | None = None) -> torch.nn.Module:
    assert path is not None
    return load_policy(
        path,
        DTYPES[config.model.dtype],
        trust_remote_code=config.model.trust_remote_code,
        quantized_on=quantized_on,
    )


def reference_of(
    config: Config, algorithm: Algorithm, device: torch.device, policy: PairModel, trainer: Trainer
) -> tuple[Callable[[ForwardBatch], torch.Tensor] | None, Callable[[], AbstractContextManager[None]]]:
    """What scores a pair for the reference: nothing, a model of its own, or the policy with its adapter off. And what
    has to be open meanwhile."""
    needs, explore = algorithm.needs, config.explore
    asks = needs.reference or needs.reference_scores or config.learner.log_kl or explore.rule == "apl"
    if not asks or explore.head_only:  # where the head alone learns, no pair is scored
        return None, nullcontext
    if config.lora.rank and config.model.reference == config.model.path:

        def base(batch: ForwardBatch) -> torch.Tensor:
            with adapter_off(policy.model):
                return trainer.forward(batch)

        return base, nullcontext
    model = PairModel(_load(config, config.model.reference))
    reference = ReferenceModel(model, device, is_offloaded=config.learner.reference_offload)
    return reference, reference.at_hand


def leave_behind(
    spec: WorkerSpec,
    policy: PairModel,
    weights: Mapping[str, dict[str, torch.Tensor]],
    head: EpistemicHead | None,
) -> None:
    """Leave the last policy behind, by the first rank: as a model, and its adapter alone if it has one; and the head
    of exploration. The model comes last: a run that has one is finished."""
    if spec.index != 0:
        return
    base, adapter = str(spec.config.model.path), adapter_of(spec.config.lora)
    if adapter is not None:
        with complete_or_absent(spec.run_dir / "adapter") as folder:
            write_adapter(folder, weights["adapter"], adapter, base=base)
    if head is not None:
        with complete_or_absent(spec.run_dir / "head") as folder:
            save_head(folder, head, encoder=spec.config.explore.encoder or spec.config.oracle.path[0])
    with complete_or_absent(spec.run_dir / "model") as folder:
        save_policy(policy.model, weights["merged"], base, folder)
