"""A very small PairRM in the published layout, for tests that read one."""

import math

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
        sequence = torch.tensor([*parts[0], *parts[1], *parts[2]])
        states = deberta_states(state, config, sequence)
        source, left, right = (states[(sequence == token).nonzero()[0, 0]] for token in ids)
        scores = [output(torch.tanh(hidden(torch.cat([source, side])))) for side in (left, right)]
        return float((scores[0] - scores[1]).mean())

    return str(folder), logit


def deberta_states(state, config, ids):
    """The last hidden states (T, H) of a DeBERTa encoder, from its description alone: disentangled attention
    (arXiv 2006.03654, equation 4) with, as in version 2, projections shared between content and position and
    logarithmic buckets for far positions."""

    def weight(name):
        return state[f"pretrained_model.{name}"]

    def linear(name, x):
        return x @ weight(f"{name}.weight").T + weight(f"{name}.bias")

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return centred / spread * weight(f"{name}.weight") + weight(f"{name}.bias")

    def heads(x):
        return x.view(len(x), config.num_attention_heads, -1).transpose(0, 1)

    span, length = config.position_buckets, len(ids)
    distances = [[bucket(i - j, span, config.max_position_embeddings) for j in range(length)] for i in range(length)]
    index = (torch.tensor(distances) + span).clamp(0, 2 * span - 1)
    relative = norm("encoder.LayerNorm", weight("encoder.rel_embeddings.weight"))
    x = norm("embeddings.LayerNorm", weight("embeddings.word_embeddings.weight")[ids])
    for n in range(config.num_hidden_layers):
        layer = f"encoder.layer.{n}"
        query, key, value = (
            heads(linear(f"{layer}.attention.self.{part}_proj", x)) for part in ("query", "key", "value")
        )
        query_r, key_r = (heads(linear(f"{layer}.attention.self.{part}_proj", relative)) for part in ("query", "key"))
        content = query @ key.transpose(1, 2)
        to_position = torch.stack([(query @ key_r.transpose(1, 2))[:, i, index[i]] for i in range(length)], dim=1)
        # The paper has the distance from j to i here; the published networks were trained with that from i to j.
        from_position = torch.stack([(key @ query_r.transpose(1, 2))[:, j, index[:, j]] for j in range(length)], dim=2)
        scores = (content + to_position + from_position) / (3 * query.shape[-1]) ** 0.5
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, -1)
        x = norm(f"{layer}.attention.output.LayerNorm", x + linear(f"{layer}.attention.output.dense", mixed))
        inner = torch.nn.functional.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", inner))
    return x


def bucket(distance, num_buckets, max_distance):
    """Near distances as they are, far ones by their logarithm."""
    middle = num_buckets // 2
    if abs(distance) <= middle:
        return distance
    share = math.log(abs(distance) / middle) / math.log((max_distance - 1) / middle)
    return int(math.copysign(math.ceil(share * (middle - 1)) + middle, distance))
