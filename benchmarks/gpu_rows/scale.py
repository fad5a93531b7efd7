"""On what device and at what size rows are measured, and how they say what they found."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

EOS, PAD, FIRST_WORD = 0, 1, 2
PYTHIA_1B = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """``tiny`` is a rehearsal: all of the code at a size that two cores manage, whose figures mean nothing.

    ``bytes_per_s`` (read and written) and ``operations_per_s`` are what the machine's own copy and matrix product
    reached, where they were measured before.
    """

    device: str
    tiny: bool
    bytes_per_s: float | None = None
    operations_per_s: float | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype_name(self) -> str:
        return "bfloat16" if self.on_gpu else "float32"

    @property
    def transport(self) -> str:
        return "cuda_ipc" if self.on_gpu else "shm"

    @property
    def num_prompts(self) -> int:
        return 8 if self.tiny else 128

    @property
    def prompt_tokens(self) -> int:
        """About as many as a post of TL;DR has."""
        return 40 if self.tiny else 400

    @property
    def new_tokens(self) -> int:
        return 9 if self.tiny else 53

    @property
    def micro_batch_size(self) -> int:
        return 4 if self.tiny else 8

    @property
    def shape(self) -> dict[str, int]:
        return TINY if self.tiny else PYTHIA_1B

    @property
    def vocab_size(self) -> int:
        return self.shape["vocab_size"]

    def place(self) -> torch.device:
        import torch

        return torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")

    def dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.on_gpu else torch.float32

    def config(self, **more: Any) -> GPTNeoXConfig:
        """Of a network of the shape of Pythia-1B, whose weights will be random."""
        from transformers import GPTNeoXConfig

        special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
        return GPTNeoXConfig(
            **self.shape, **special, max_position_embeddings=2048, tie_word_embeddings=False, use_cache=True, **more
        )

    def network(self, auto_class: Any, config: GPTNeoXConfig) -> Any:
        """A network with random weights, made where it will stand."""
        import torch

        torch.manual_seed(0)
        with self.place():
            return auto_class.from_config(config, dtype=self.dtype())

    def parameter_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config())
        return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]

    def tokens(self, rng: np.random.Generator, length: int) -> npt.NDArray[np.int32]:
        return rng.integers(FIRST_WORD, self.vocab_size, length).astype(np.int32)

    def synchronize(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word for each token, so that a text has as many tokens as were sampled, whatever a random network samples."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", *(f"w{i}" for i in range(FIRST_WORD, vocab_size))]
    core = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def text_of(tokens: npt.NDArray[np.int32]) -> str:
    """What :func:`word_tokenizer` makes of ordinary ``tokens``, and them of it."""
    return " ".join(f"w{token}" for token in tokens)


@dataclass(slots=True)
class Tell:
    """Writes each finding to a file at once, so that what is known survives the end of a row that goes wrong."""

    path: Path
    _file: Any = field(init=False)

    def __post_init__(self) -> None:
        self._file = self.path.open("a")

    def __call__(self, what: str, said: str, *, is_met: bool | None = None, **numbers: Any) -> None:
        """``is_met`` says whether a limit was kept, where there is one."""
        self._file.write(json.dumps({"what": what, "said": said, "is_met": is_met, "numbers": numbers}) + "\n")
        self._file.flush()


def memory_bytes(scale: Scale, pids: list[int]) -> int:
    """What the GPU holds, all processes together; on a CPU what these processes hold."""
    if scale.on_gpu:
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free
    fields = [Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0] for pid in pids]
    return sum(map(int, fields)) * 1024
