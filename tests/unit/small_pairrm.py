"""A very small PairRM in the published layout, for tests that read one."""

import torch
from safetensors.torch import save_file
from small_folders import byte_tokenizer
from tokenizers import processors
from transformers import DebertaV2Config, DebertaV2Model, PreTrainedTokenizerFast

PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>"]
HIDDEN, TASKS = 16, 3


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """As the published one, ``[CLS] text [SEP]`` with the three prefixes as tokens; a token is a byte."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "additional_special_tokens": PREFIXES})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=list(ids.items())
    )
    return tokenizer


def save_pairrm(folder, *, leave_out=()):
    """A random PairRM in the published layout, and the encoder and the head that it was written from."""
    torch.manual_seed(0)
    tokenizer = pair_tokenizer()
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=2,
        initializer_range=0.3,
    )
    config.architectures = ["DebertaV2PairRM"]
    config.n_tasks, config.drop_out = TASKS, 0.05
    ids = tokenizer.convert_tokens_to_ids(PREFIXES)
    config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id = ids
    encoder = DebertaV2Model(config).eval()
    hidden, output = torch.nn.Linear(2 * HIDDEN, HIDDEN), torch.nn.Linear(HIDDEN, TASKS)
    output.weight.data *= 10
    state = {f"pretrained_model.{name}": value for name, value in encoder.state_dict().items()}
    state |= {f"head_layer.1.{name}": value for name, value in hidden.state_dict().items()}
    state |= {f"head_layer.4.{name}": value for name, value in output.state_dict().items()}
    folder.mkdir()
    save_file(
        {name: value.contiguous() for name, value in state.items() if name not in leave_out},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def logit(prompt, one, other):
        parts = [
            tokenizer(prefix + text)["input_ids"] for prefix, text in zip(PREFIXES, (prompt, one, other), strict=True)
        ]
        sequence = torch.tensor([[*parts[0], *parts[1], *parts[2]]])
        states = encoder(input_ids=sequence, attention_mask=torch.ones_like(sequence)).last_hidden_state[0]
        source, left, right = (states[(sequence[0] == token).nonzero()[0, 0]] for token in ids)
        scores = [output(torch.tanh(hidden(torch.cat([source, side])))) for side in (left, right)]
        return float((scores[0] - scores[1]).mean())

    return str(folder), logit
