"""``oatlite generate``, ``label`` and ``chat`` as processes, on models that the tests make."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from commands import CPU, NEW_TOKENS, done, greedy, load, logprob, oatlite, whole
from live import state_of, wait_until
from runs import DEADLINE_S, ENVIRONMENT, OATLITE, TEMPORARY, Inputs, read_lines, run_to_end
from small_folders import byte_tokenizer, save_model

from oatlite.oracles.reward_model import RewardModelOracle


def test_generate_then_label_then_train_offline(llama: Inputs, tmp_path: Path) -> None:
    samples, pairs = tmp_path / "samples.jsonl", tmp_path / "pairs.jsonl"
    given = ("--model", llama.policy, "--prompts", llama.prompts, "--max-new-tokens", str(NEW_TOKENS))
    out = done("generate", *given, *CPU, "--output", samples, "--num-samples", "2", "--temperature", "1.0")
    assert f"{samples}: 160 responses to 80 prompts" in out and f"oatlite label --data {samples}" in out
    rows = read_lines(samples)
    assert [(row["row"], row["sample"]) for row in rows] == [(i, n) for i in range(80) for n in range(2)]
    model, tokenizer = load(llama.policy)
    for row in rows:
        assert row["prompt"] == f"Say number {row['row']}: " and row["reference"] == f" it is {row['row']}"
        assert row["is_finished"] or row["num_tokens"] == NEW_TOKENS
    assert len({row["response"] for row in rows}) > 150, "samples differ"
    ascii_rows = [row for row in rows if row["response"].isascii() and not row["is_finished"]]
    for row in ascii_rows:
        ids = tokenizer(row["response"])["input_ids"]
        if len(ids) == row["num_tokens"]:
            expected = logprob(model, tokenizer(row["prompt"])["input_ids"], ids)
            assert row["logprob"] == pytest.approx(expected, abs=1e-3)

    out = done("label", "--data", samples, "--oracle", llama.reward_model, "--output", pairs, *CPU)
    found = read_lines(pairs)
    assert f"{pairs}: {len(found)} pairs" in out and len(found) > 60
    oracle = RewardModelOracle(str(llama.reward_model))
    for name in ("chosen", "rejected"):
        scores = oracle.score([row["prompt"] for row in found], [row[name] for row in found])
        np.testing.assert_allclose([row[f"{name}_reward"] for row in found], scores, atol=1e-5)
    assert all(row["margin"] > 0 and row["win_probability"] > 0.5 for row in found)

    folder = tmp_path / "offline"
    train = ("train", "--offline", "--preferences", pairs, "--model", llama.policy, "--algo", "dpo", *CPU)
    sizes = ("--prompts-per-step", "16", "--micro-batch-size", "4", "--eval-prompts", "8", "--lr", "0.001")
    run = run_to_end(
        [str(OATLITE), *map(str, train), *sizes, "--run-dir", str(tmp_path), "--name", folder.name, "--ui", "plain"],
        folder,
    )
    assert run.exit_code == 0, run.output
    assert len(run.records("step")) >= 3


def test_generate_with_an_adapter_is_greedy_as_hugging_face_with_it(llama: Inputs, tmp_path: Path) -> None:
    model, tokenizer = load(llama.policy)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    output = tmp_path / "new" / "greedy.jsonl"
    given = ("--prompts", llama.prompts, "--max-prompts", "12", "--max-new-tokens", str(NEW_TOKENS))
    done(
        "generate",
        "--model",
        llama.policy,
        "--adapter",
        tmp_path / "adapter",
        *given,
        *CPU,
        "--greedy",
        "--output",
        output,
    )
    rows = read_lines(output)
    assert len(rows) == 12
    with adapted.disable_adapter():
        plain = [greedy(adapted, tokenizer, row["prompt"])[0] for row in rows]
    differ = 0
    for row, without in zip(rows, plain, strict=True):
        text, total = greedy(adapted, tokenizer, row["prompt"])
        assert whole(row["response"]) == whole(text)
        assert row["logprob"] == pytest.approx(total, abs=1e-3)
        differ += text != without
    assert differ > 6, "the adapter does something"


def chat_model(folder: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128}
    return Path(save_model(folder, "llama", seed=1, tokenizer=byte_tokenizer(chat=True, bos=True), **sizes))


def test_chat_through_a_pipe_is_greedy_as_hugging_face(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "chatty")
    model, tokenizer = load(folder)
    lines = ["hello", "and now?", "/reset", "x" * 300, "again"]
    given = "".join(f"{line}\n" for line in lines) + "/exit\nnever\n"
    finished = oatlite("chat", "--model", folder, *CPU, "--greedy", "--max-new-tokens", str(NEW_TOKENS), given=given)
    assert finished.returncode == 0, finished.stderr
    answers = finished.stdout.split("\n")
    assert len(answers) == 5 and answers[2] == answers[4] == "", "a line for each question, and nothing else"

    def expected(*turns: str) -> str:
        text = "".join(f"<{'user' if i % 2 == 0 else 'assistant'}>{turn}" for i, turn in enumerate(turns))
        ids = tokenizer(f"<bos>{text}<assistant>", add_special_tokens=False, return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)[0, ids.shape[1] :]
        return whole(re.sub("\r\n|\r|\n", r"\\n", tokenizer.decode(new, skip_special_tokens=True)))

    assert whole(answers[0]) == expected("hello")
    assert whole(answers[3]) == expected("again")
    assert answers[1]
    told = finished.stderr.splitlines()
    assert told[0] == "the conversation starts anew" and "shorten it" in told[1] and len(told) == 2


BRACKETED_PASTE = re.compile(rb"\x1b\[\?2004[hl]\r?")


class Terminal:
    """The person's end of a pseudo-terminal, at whose other end is the process ``child``."""

    def __init__(self, descriptor: int, child: int) -> None:
        self._descriptor = descriptor
        self._child = child
        self._unread = b""

    def type(self, keys: bytes) -> None:
        os.write(self._descriptor, keys)

    def until_something(self) -> None:
        """Wait for a character, not for what readline says to the terminal alone."""
        while not BRACKETED_PASTE.sub(b"", self._unread):
            self._read()

    def until(self, words: bytes) -> bytes:
        """What is shown up to ``words``; what follows is kept for the next time."""
        while words not in self._unread:
            self._read()
        shown, _, self._unread = self._unread.partition(words)
        return shown

    def until_asked(self) -> bytes:
        """What is shown up to a prompt at which the process waits: between the prompt and its wait, Python's readline
        leaves a signal for the key after it."""
        shown = self.until(b"\r\n> ")
        wait_until(lambda: state_of(self._child) == "S", DEADLINE_S)
        return shown

    def _read(self) -> None:
        ready, _, _ = select.select([self._descriptor], [], [], DEADLINE_S)
        assert ready, f"nothing comes after {self._unread!r}"
        self._unread += os.read(self._descriptor, 4096)


def test_chat_in_a_terminal_streams_and_stops(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 4096}
    endless = save_model(tmp_path / "endless", "llama", tokenizer=byte_tokenizer(eos=False), eos_token_id=None, **sizes)
    command = [str(OATLITE), "chat", "--model", endless, *CPU, "--max-new-tokens", "4000"]
    child, descriptor = pty.fork()
    if child == 0:
        heed_ctrl_c()
        os.execve(command[0], command, ENVIRONMENT)
    terminal = Terminal(descriptor, child)
    try:
        terminal.until(b"/reset forgets")
        terminal.until_asked()
        terminal.type(b"go on\n")
        terminal.until(b"go on\r\n")
        terminal.until_something()  # so the answer has begun, and 4,000 tokens take longer than what follows
        terminal.type(b"\x03")
        assert len(terminal.until_asked()) < 3000
        terminal.type(b"\x03")
        terminal.until(b"oatlite: error: interrupted")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(descriptor)


def heed_ctrl_c() -> None:
    """Tests that run in the background of a shell have Ctrl-C ignored, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(started: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed; one that does not end is killed, so that the next test finds nothing of it."""
    try:
        return started.communicate(timeout=30)
    finally:
        started.kill()


def start_generating(inputs: Inputs, output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(str(OATLITE), "generate", "--model", str(inputs.policy), "--prompts", str(inputs.prompts), *CPU),
            *("--output", str(output), "--num-samples", "50", "--max-new-tokens", "230"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=heed_ctrl_c,
    )


def wait_for(name: str, started: subprocess.Popen[str]) -> None:
    """Until there is such a file in the private folder of the command."""
    deadline = time.monotonic() + DEADLINE_S
    while not list(TEMPORARY.glob(f"oatlite-*/{name}")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def engines() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if b"oatlite.inference.process" in words and str(TEMPORARY).encode() in words:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("number", "stage", "code", "word"),
    [(signal.SIGINT, "job.json", 130, "interrupted"), (signal.SIGTERM, "replies.jsonl", 143, "terminated")],
)
def test_a_signal_leaves_nothing(llama: Inputs, tmp_path: Path, number: int, stage: str, code: int, word: str) -> None:
    """While the engine starts, and while it generates."""
    started = start_generating(llama, tmp_path / "out.jsonl")
    wait_for(stage, started)
    started.send_signal(number)
    out, err = ended(started)
    assert started.returncode == code
    told = [line for line in err.splitlines() if not line.startswith("generate: ")]
    assert out == "" and told == [f"oatlite: error: {word}"]
    assert list(tmp_path.iterdir()) == []
    assert list(TEMPORARY.glob("oatlite-*")) == [] and engines() == []


def test_an_engine_that_is_killed_is_told_with_its_log(llama: Inputs, tmp_path: Path) -> None:
    started = start_generating(llama, tmp_path / "out.jsonl")
    wait_for("log", started)
    while not (found := engines()):  # the log is there before the process is
        assert started.poll() is None
    [engine] = found
    os.kill(engine, signal.SIGKILL)
    out, err = ended(started)
    assert started.returncode == 3 and out == "" and err.count("\n") == 1
    assert f"the engine of {llama.policy} failed: its process was killed by signal 9; log: " in err
    [log] = TEMPORARY.glob("oatlite-*")
    assert err.endswith(f"{log}\n") and list(tmp_path.iterdir()) == []
    log.unlink()
