"""A reward model as the oracle: any Hugging Face sequence-classification model with one label.

A decoder scores a response as ``tokenize(prompt) + tokenize(response) + EOS``: the two are tokenized apart, as a policy
produces them, so a score does not depend on merges across the border, and the score is read at EOS. This is what
``oatlite reward-model`` trains, down to the space that is put between a prompt and a response which bring none.
An encoder reads the two texts as its tokenizer joins two, with segments where it has them.
With a chat template, the template alone says how the text looks and where it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from oatlite.continuations import join
from oatlite.errors import ConfigError, OracleError
from oatlite.layouts import LayoutName
from oatlite.oracles.base import Floats, RewardOracle
from oatlite.oracles.conversations import as_text, messages_of
from oatlite.oracles.loading import (
    TRAIN_ONE,
    load_tokenizer,
    out_of_memory_told,
    read_config,
    require_finite,
    token_limit,
    torch_dtype,
    unused_template,
)
from oatlite.oracles.prefix_scores import PrefixScores, in_pairs, with_prefix
from oatlite.oracles.sequences import Tokens, batches, longest_first, model_inputs, text_pairs
from oatlite.sources import first_line

log = logging.getLogger(__name__)

HEAD = "ForSequenceClassification"


def check_reward_model(path: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the reward model at ``path``, a folder or a hub id, without loading weights.

    Raises ConfigError when there is none, or it is not a classifier with one label.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    architectures = getattr(config, "architectures", None) or ["no architecture"]
    is_classifier = any(name.endswith(HEAD) for name in architectures)
    if not is_classifier and f"AutoModel{HEAD}" not in (getattr(config, "auto_map", None) or {}):
        raise ConfigError(f"{path} is {', '.join(architectures)}: it has no classification head", TRAIN_ONE)
    if config.num_labels != 1:
        raise ConfigError(
            f"the classifier {path} has {config.num_labels} labels, and a reward model has one", TRAIN_ONE
        )
    return config


def pooled_scores(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Rewards (B,) of right-padded sequences (B, T), read at the last real token of each; see :func:`model_inputs`.

    The models' own forward takes "the last token that is not ``pad_token_id``": it refuses a batch where that is
    None, and skips the EOS that it is asked to score where that is EOS. So a decoder's head is applied here, at the
    position that the mask gives; it is also applied to B positions and not to B * T. Models without a head called
    ``score`` are encoders, which pool at the first token and take the mask into account themselves.
    """
    head = getattr(model, "score", None)
    if head is None:
        return model(**inputs).logits[:, 0]
    return head(pooled_states(model.base_model, inputs, is_decoder=True))[:, 0]


def pooled_states(backbone: Any, inputs: Mapping[str, Tensor], *, is_decoder: bool) -> Tensor:
    """Last hidden states (B, D) of right-padded sequences (B, T): at the last token, of an encoder at the first."""
    more = {"use_cache": False} if is_decoder else {}
    hidden = backbone(**inputs, **more).last_hidden_state
    rows = torch.arange(len(hidden), device=hidden.device)
    last = (inputs["attention_mask"].sum(dim=1) - 1).to(hidden.device)
    return hidden[rows, last if is_decoder else torch.zeros_like(rows)]


class RewardModelOracle(RewardOracle):
    """Scores in batches of at most ``batch_tokens`` padded tokens, the longest sequences first.

    Where the model allows it, what the responses to one prompt have in common is computed once for two of them.

    ``max_tokens`` (or the model's own limit, if that is lower) counts prompt, response and EOS: what is longer gets
    NaN. ``dtype`` "auto" is bfloat16 on a GPU and float32 on a CPU. ``chat_template`` wraps prompt and response in
    the template of the reward model's own tokenizer. None wraps nothing, and warns where there is a template. A prompt
    that is a JSON list of messages is a conversation, and without the template written out as plain text.
    ``device`` "auto" splits the model over all GPUs that are visible.

    Raises ConfigError when the model cannot be loaded or lacks its head or its template.
    """

    def __init__(
        self,
        path: str,
        *,
        chat_template: bool | None = False,
        max_tokens: int | None = None,
        batch_tokens: int = 8192,
        dtype: str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        config = check_reward_model(path, trust_remote_code=trust_remote_code)
        self.path = path
        self.chat_template = bool(chat_template)
        self.max_tokens = token_limit(max_tokens, config)
        self.batch_tokens = batch_tokens
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        if chat_template and getattr(self.tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"the tokenizer of the reward model {path} has no chat template", "oracle.chat_template = false"
            )
        if note := unused_template(path, self.tokenizer, chat_template):
            log.warning(note)
        place = torch.device("cuda" if device == "auto" else device)
        model = _load_model(
            path,
            torch_dtype(dtype, place),
            trust_remote_code=trust_remote_code,
            device_map="auto" if device == "auto" else None,
        )
        self.model = model if device == "auto" else model.to(place)
        self.device = self.model.get_input_embeddings().weight.device
        self._prefix_scores: PrefixScores | None = None
        self._layout: LayoutName = "plain"
        self._is_decoder = hasattr(self.model, "score")
        if self._is_decoder:
            prefix_scores = PrefixScores(self.model)
            self._layout = prefix_scores.layout(self.max_tokens)
            self._prefix_scores = None if self._layout == "plain" else prefix_scores

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str] | None = None
    ) -> Floats:
        """See :meth:`RewardOracle.score`. Raises OracleError when the model gives something that is not a number."""
        del references  # a reward model reads the response alone
        return self._of_each(prompts, responses, 1, self._rewards)[:, 0]

    def features(self, prompts: Sequence[str], responses: Sequence[str]) -> Floats:
        """The hidden states (B, D) float32 that rewards are read from; NaN for a response that is too long."""
        return self._of_each(prompts, responses, self.model.config.get_text_config().hidden_size, self._states)

    def _of_each(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        width: int,
        forward: Callable[[Sequence[Any]], Tensor],
    ) -> Floats:
        """What ``forward`` gives of rows of one or two sequences, (B, at most 2, width), sorted back to the responses,
        (B, width)."""
        sequences = self._tokens(prompts, responses)
        found = np.full((len(sequences), width), np.nan, np.float32)
        fitting = [i for i, tokens in enumerate(sequences) if 0 < len(tokens.ids) <= self.max_tokens]
        if self._prefix_scores is None:
            groups = [[i] for i in fitting]
            rows: list[Any] = [sequences[i] for i in fitting]
            lengths = [len(tokens.ids) for tokens in rows]
        else:
            groups = in_pairs(prompts, fitting)
            rows = [with_prefix([sequences[i].ids for i in group]) for group in groups]
            lengths = [pair.num_tokens for pair in rows]
        for batch in batches(longest_first(lengths), lengths, self.batch_tokens):
            with out_of_memory_told(f"the reward model {self.path}", self.batch_tokens), torch.inference_mode():
                values = forward([rows[b] for b in batch]).float().cpu().numpy()
            for b, of_pair in zip(batch, values, strict=True):
                found[groups[b]] = of_pair[: len(groups[b])]
            members = [i for b in batch for i in groups[b]]
            require_finite(found[members], f"the reward model {self.path} gave scores")
        return found

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt with its response; see the top of this file. An empty response is EOS alone."""
        return [tokens.ids for tokens in self._tokens(prompts, responses)]

    def _tokens(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Tokens]:
        if self.chat_template:
            return [Tokens(self._templated(prompt, text)) for prompt, text in zip(prompts, responses, strict=True)]
        plain = {prompt: as_text(prompt) for prompt in dict.fromkeys(prompts)}
        if not self._is_decoder:
            return text_pairs(self.tokenizer, self.model, [plain[prompt] for prompt in prompts], responses)
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        prompt_ids = {prompt: self.tokenizer(text, verbose=False)["input_ids"] for prompt, text in plain.items()}
        return [
            Tokens([*prompt_ids[prompt], *self._ids(join(plain[prompt], text) if text else ""), *end])
            for prompt, text in zip(prompts, responses, strict=True)
        ]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _templated(self, prompt: str, response: str) -> list[int]:
        messages = [*messages_of(prompt), {"role": "assistant", "content": response}]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except jinja2.TemplateError as error:
            raise OracleError(
                f"the chat template of the reward model {self.path} refuses a conversation: {first_line(error)}",
                "set oracle.chat_template = false, or leave such prompts out",
            ) from error
        return self._ids(text)

    def _rewards(self, rows: Sequence[Any]) -> Tensor:
        """(B, 1, 1) of sequences; (B, 2, 1) of pairs: where one has one sequence, the second column means nothing."""
        if self._prefix_scores is not None:
            return self._prefix_scores(rows, self._layout).view(-1, 2, 1)
        return pooled_scores(self.model, model_inputs(rows, self.device))[:, None, None]

    def _states(self, rows: Sequence[Any]) -> Tensor:
        """(B, 1, D) or (B, 2, D), as above."""
        if self._prefix_scores is not None:
            return self._prefix_scores.states(rows, self._layout).view(len(rows), 2, -1)
        inputs = model_inputs(rows, self.device)
        return pooled_states(self.model.base_model, inputs, is_decoder=self._is_decoder)[:, None]


def _load_model(path: str, dtype: torch.dtype, *, trust_remote_code: bool, device_map: str | None = None) -> Any:
    from transformers import AutoModelForSequenceClassification

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=dtype,
            num_labels=1,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            output_loading_info=True,
        )
    except Exception as error:  # torn weights, a dtype or an architecture that this version cannot load
        raise ConfigError(f"the reward model {path} cannot be loaded: {first_line(error)}", TRAIN_ONE) from error
    if info["missing_keys"]:
        raise ConfigError(f"the weights of {path} lack {', '.join(sorted(info['missing_keys'])[:3])}", TRAIN_ONE)
    return model.eval().requires_grad_(False)
