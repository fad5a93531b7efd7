"""Claim: at the shape of Reddit TL;DR, on a CPU, a step of online DPO is at least 3 times as fast as TRL's for a model
of 5M parameters in float32, and at least 4 times for one of 116M in bfloat16.

Both sides, one after the other: 32 prompts of 400 tokens, two responses of 53 to each, a reward model of 5M parameters
in float32, DPO with beta 0.1 against the initial policy, one AdamW step; the same folders, prompts, temperature and
number of threads, and no evaluation, checkpoint or log in between. Weights are random, so EOS ends a response once in
thousands of tokens: the mean length of each side is printed.

oatlite runs as ``oatlite train`` and its step times are the ones that it logs. TRL's OnlineDPOTrainer runs in a process
of its own, set up to be as fast as it can on a CPU: transformers' generation with its cache (with vLLM's CPU build TRL
fails), no gradient checkpointing, the number of prompts at a time that is best for it, and for the bfloat16 model no
float32 copy of the weights, which oatlite keeps. All prompts have one length, so that TRL, which pads, need not.

Beside it stands what each of oatlite's stages must compute at least, and which share of the rate of a large matrix
product in that type it reaches: a measured rate and no bound, which other shapes may pass by a little.

    pip install -e '.[cpu]'
    python benchmarks/versus_trl.py [--models 5M-float32,116M-bfloat16] [--steps 4] [--trl-steps 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pair_forward import SHAPES
from report import machine, save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

WANTED = {"5M-float32": 3.0, "116M-bfloat16": 4.0}
REWARD_MODEL = "5M-float32"
PROMPT_TOKENS = 400
NEW_TOKENS = 53
PROMPTS_PER_STEP = 32
TEMPERATURE = 1.0
LR = 1e-6
BETA = 0.1
ADAM_BETAS = (0.9, 0.95)  # oatlite's
MAX_GRAD_NORM = 1.0
WARM_UP = 2
TRL_WARM_UP = 1  # it has no kernels to prepare
# Prompts at a time, the best of 4, 8, 16 and 32 for each side. TRL generates for so many at a time, too.
MICRO_BATCH = {"5M-float32": 8, "116M-bfloat16": 8}
TRL_MICRO_BATCH = {"5M-float32": 8, "116M-bfloat16": 8}
STAGES = ("generate", "score", "reference", "learn", "sync", "rest")
Seconds = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama with tied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, name: str) -> Shape:
        hidden, intermediate, layers, vocabulary, _ = SHAPES[name.partition("-")[0]]
        return cls(hidden=hidden, intermediate=intermediate, layers=layers, vocabulary=vocabulary)

    def operations(self, *, tokens: float, looks: float, predictions: float) -> float:
        """Floating-point operations of a forward pass: ``looks`` counts the keys that all queries look at, and
        ``predictions`` the tokens that need logits."""
        weights = self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)
        attention = 2 * self.layers * self.hidden
        return 2 * (weights * tokens + attention * looks + self.vocabulary * self.hidden * predictions)


def dtype_of(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name.partition("-")[2])
    return dtype


def num_threads() -> int:
    return len(os.sched_getaffinity(0))


# ------------------------------------------------------------------ what both sides read


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word is a token, so that the text of a response has as many tokens for the reward model."""
    words = ["<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def make_model(name: str, auto_class: Any, vocabulary: int, folder: Path, **more: Any) -> None:
    shape = Shape.of(name)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        **more,
    )
    torch.manual_seed(0)
    auto_class.from_config(config).to(dtype_of(name)).save_pretrained(folder)
    word_tokenizer(vocabulary).save_pretrained(folder)


def make_inputs(name: str, num_prompts: int, folder: Path) -> None:
    vocabulary = Shape.of(name).vocabulary
    make_model(name, AutoModelForCausalLM, vocabulary, folder / "policy")
    make_model(REWARD_MODEL, AutoModelForSequenceClassification, vocabulary, folder / "reward-model", num_labels=1)
    rng = np.random.default_rng(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(num_prompts):
            words = (f"w{i}" for i in rng.integers(3, vocabulary, PROMPT_TOKENS))
            # TRL puts nothing between a prompt and its response.
            file.write(json.dumps({"prompt": " ".join(words) + " "}) + "\n")


# ------------------------------------------------------------------ oatlite


def run_oatlite(name: str, num_steps: int, folder: Path) -> Seconds:
    """Mean seconds of a step and of its stages after the warm-up, and the mean length of a response in tokens."""
    options = {
        "model.path": folder / "policy",
        "model.dtype": name.partition("-")[2],
        "data.prompts": folder / "prompts.jsonl",
        "data.max_prompts": PROMPTS_PER_STEP * (WARM_UP + num_steps),
        "sampling.max_new_tokens": NEW_TOKENS,
        "sampling.temperature": TEMPERATURE,
        "rollout.prompts_per_step": PROMPTS_PER_STEP,
        "learner.micro_batch_size": MICRO_BATCH[name],
        "learner.lr": LR,
        "learner.schedule": "constant",
        "learner.max_grad_norm": MAX_GRAD_NORM,
        "oracle.path": folder / "reward-model",
        "placement.gpus": 0,
        "eval.prompts": 0,
        "checkpoint.save_every": 10**6,
    }
    command = [sys.executable, "-m", "oatlite_cli.main", "train", "--algo", "dpo", "--beta", str(BETA)]
    command += ["--ui", "plain", "--run-dir", str(folder), "--name", "oatlite"]
    command += [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    run(command)
    lines = (folder / "oatlite" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "step"][WARM_UP:]
    perf = {key: statistics.mean(record["perf"][key] for record in records) for key in records[0]["perf"]}
    seconds = {stage: perf[f"{stage}_s"] for stage in ("generate", "score", "reference", "learn", "sync")}
    seconds["learn"] -= seconds["reference"]  # which is part of it
    return {
        "step": perf["step_s"],
        **seconds,
        "rest": perf["step_s"] - sum(seconds.values()),
        "response_tokens": statistics.mean(record["response_tokens"] for record in records),
        "trained_pairs": statistics.mean(record["trained_pairs"] for record in records),
    }


def run(command: list[str], **more: str) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | more
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if finished.returncode:
        sys.exit(f"{' '.join(command[:5])} ... failed:\n{finished.stdout}{finished.stderr}")


# ------------------------------------------------------------------ TRL


def run_trl(name: str, num_steps: int, folder: Path) -> Seconds:
    """The same of TRL, whose backward passes and optimizer are what is left of its step."""
    threads = str(num_threads())
    command = [sys.executable, __file__, "--trl-side", f"{name},{num_steps},{folder}"]
    run(command, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, TRL_EXPERIMENTAL_SILENCE="1")
    found: Seconds = json.loads((folder / "trl.json").read_text())
    return found


class StageClock:
    """Seconds of each step, and of the stages in it."""

    def __init__(self) -> None:
        self.steps: list[Seconds] = []
        self._start = 0.0
        self._stages: Seconds = {}

    def start_step(self) -> None:
        self._start, self._stages = time.perf_counter(), {}

    def end_step(self) -> None:
        self.steps.append({"step": time.perf_counter() - self._start, **self._stages})

    def add(self, name: str, value: float) -> None:
        self._stages[name] = self._stages.get(name, 0.0) + value

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)


def trl_side(name: str, num_steps: int, folder: Path) -> None:
    """Train with TRL in this process, and write means over the steps after the warm-up to ``trl.json``."""
    import datasets
    from transformers import TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    torch.set_num_threads(num_threads())
    clock = StageClock()
    micro_batch = TRL_MICRO_BATCH[name]

    class TimedTrainer(OnlineDPOTrainer):
        def _generate(self, *arguments: Any, **more: Any) -> Any:
            with clock.stage("generate"):
                found = super()._generate(*arguments, **more)
            clock.add("response_tokens", float(found[3].sum()) / (2 * PROMPTS_PER_STEP))
            return found

        def _calculate_rewards_from_functions(self, *arguments: Any, **more: Any) -> Any:
            with clock.stage("score"):
                return super()._calculate_rewards_from_functions(*arguments, **more)

        def _forward(self, *arguments: Any, **more: Any) -> Any:
            with clock.stage("learn" if torch.is_grad_enabled() else "reference"):
                return super()._forward(*arguments, **more)

    class StepTimes(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **more: Any) -> None:
            clock.start_step()

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            clock.end_step()
            clock.start_step()

    options = OnlineDPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,  # autocast, which a model that is in bfloat16 already has no use for
        gradient_checkpointing=False,  # it would also switch the cache off
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=PROMPTS_PER_STEP // micro_batch,
        max_steps=TRL_WARM_UP + num_steps,
        max_new_tokens=NEW_TOKENS,
        max_length=PROMPT_TOKENS + NEW_TOKENS,
        temperature=TEMPERATURE,
        beta=[BETA],
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta1=ADAM_BETAS[0],
        adam_beta2=ADAM_BETAS[1],
        max_grad_norm=MAX_GRAD_NORM,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype_of(name)),
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(
            folder / "reward-model", dtype=dtype_of(REWARD_MODEL), num_labels=1
        ),
        args=options,
        train_dataset=datasets.load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        reward_processing_classes=AutoTokenizer.from_pretrained(folder / "reward-model"),
        callbacks=[StepTimes()],
    ).train()
    steps = clock.steps[TRL_WARM_UP:]
    means = {key: statistics.mean(step[key] for step in steps) for key in steps[0]}
    means["rest"] = means["step"] - sum(means[stage] for stage in ("generate", "score", "reference", "learn"))
    (folder / "trl.json").write_text(json.dumps(means))


# ------------------------------------------------------------------ the machine's limit


def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second in a large matrix product, the best of many: what the machine can do."""
    size = 2048
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    durations = []
    for _ in range(40):
        start = time.perf_counter()
        left @ right
        durations.append(time.perf_counter() - start)
    return 2 * size**3 / min(durations)


def least_operations(name: str) -> dict[str, float]:
    """Floating-point operations that a stage cannot do without, where a prompt is computed once for both responses and
    logits only where a token is predicted. A backward pass is worth two forward ones."""
    pairs, prompt, response = PROMPTS_PER_STEP, PROMPT_TOKENS, NEW_TOKENS
    tokens = pairs * (prompt + 2 * response)
    looks = pairs * (prompt * (prompt + 1) / 2 + 2 * response * (prompt + (response + 1) / 2))
    predictions = pairs * 2 * response
    forward = Shape.of(name).operations(tokens=tokens, looks=looks, predictions=predictions)
    return {
        "generate": forward,
        "score": Shape.of(REWARD_MODEL).operations(tokens=tokens, looks=looks, predictions=0),
        "reference": forward,
        "learn": 3 * forward,
    }


# ------------------------------------------------------------------ both, side by side


def compare(name: str, num_steps: int, num_trl_steps: int) -> dict[str, Any]:
    rates = {stage: product_rate(dtype_of(REWARD_MODEL if stage == "score" else name)) for stage in ("score", "learn")}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_inputs(name, PROMPTS_PER_STEP * max(WARM_UP + num_steps, TRL_WARM_UP + num_trl_steps), folder)
        oatlite = run_oatlite(name, num_steps, folder)
        trl = run_trl(name, num_trl_steps, folder)
    least = {
        stage: count / rates["score" if stage == "score" else "learn"]
        for stage, count in least_operations(name).items()
    }
    return {
        "model": name,
        "oatlite": oatlite,
        "trl": trl,
        "speedup": trl["step"] / oatlite["step"],
        "wanted": WANTED[name],
        "product_gflops": rates["learn"] / 1e9,
        "least_s": least | {"step": sum(least.values())},
        "operations": least_operations(name),
    }


def show(row: dict[str, Any]) -> None:
    oatlite, trl, least = row["oatlite"], row["trl"], row["least_s"]
    print(f"\n{row['model']}: {row['speedup']:.2f}x as fast, wanted {row['wanted']:.0f}x")
    print("s/step".ljust(12), *(heading.rjust(9) for heading in ("TRL", "oatlite", "least", "reached")))
    for stage in (*STAGES, "step"):
        numbers = [f"{side[stage]:.2f}" if stage in side else "" for side in (trl, oatlite, least)]
        numbers.append(f"{least[stage] / oatlite[stage]:.0%}" if stage in least else "")
        print(stage.ljust(12), *(number.rjust(9) for number in numbers))
    print(f"tokens of a response: TRL {trl['response_tokens']:.1f}, oatlite {oatlite['response_tokens']:.1f}; ", end="")
    print(f"pairs that oatlite trains on: {oatlite['trained_pairs']:.1f} of {PROMPTS_PER_STEP}; ", end="")
    print(f"matrix products: {row['product_gflops']:.0f} GFLOP/s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(WANTED))
    parser.add_argument("--steps", type=int, default=4, help="measured steps of oatlite")
    parser.add_argument("--trl-steps", type=int, default=2, help="measured steps of TRL")
    parser.add_argument("--trl-side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trl_side:
        name, num_steps, folder = arguments.trl_side.split(",")
        trl_side(name, int(num_steps), Path(folder))
        return 0
    rows = []
    for name in arguments.models.split(","):
        rows.append(compare(name, arguments.steps, arguments.trl_steps))
        show(rows[-1])
    is_met = all(row["speedup"] >= row["wanted"] for row in rows)
    print(f"\n{machine()}: {'met' if is_met else 'MISSED'}")
    print(save("versus_trl", prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, prompts=PROMPTS_PER_STEP, rows=rows))
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
