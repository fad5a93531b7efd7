"""``oatlite sft`` and ``oatlite reward-model`` on a model that exists: what TRL makes of rows, and what comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from oatlite_cli.main import main
from safetensors.torch import load_file
from silent_server import silent_server
from small_folders import byte_tokenizer, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from oatlite.checkpoint import MANIFEST, CheckpointWriter, read, steps_of
from oatlite.data import raw_text
from oatlite.errors import CheckpointError, ConfigError, DeadlineExceeded, OatliteError, WorkerDied
from oatlite.finetuning import ranks
from oatlite.finetuning.options import Habits, RankSpec, TuningOptions
from oatlite.finetuning.rank import make_trainer
from oatlite.finetuning.run import check_resume, checkpoints_of, finetune
from oatlite.fitting import Report
from oatlite.metrics.sinks import WANDB_CLOSE_S
from oatlite.oracles.reward_model import RewardModelOracle

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LONG_S = 600.0
COLOURS = ["red", "blue", "green", "black"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Path(save_model(tmp_path_factory.mktemp("base") / "policy", tokenizer=tokenizer, seed=1, **SIZES))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def references(path: Path, num: int = 40) -> Path:
    return write(path, [{"prompt": f"number {i}:", "reference": f"it is {COLOURS[i % 4]}"} for i in range(num)])


def run(command: str, model: Path, data: Path, output: Path, *more: str) -> Path:
    arguments = [command, "--model", str(model), "--data", str(data), "--output", str(output)]
    assert main([*arguments, *more]) == 0
    return output


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def options_for(model: Path, **more) -> TuningOptions:
    defaults = {
        "task": "policy",
        "model": str(model),
        "epochs": 1,
        "lr": 1e-3,
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_tokens": 64,
    }
    return TuningOptions(**(defaults | more))


def spec_for(options: TuningOptions, folder: Path, **habits) -> RankSpec:
    places = {name: str(folder / name) for name in ("folder", "private", "checkpoints")}
    return RankSpec(options=options, habits=Habits(**habits), resume_from=None, **places)


def ignore(*_: object) -> None:
    """Progress that nobody reads."""


def labelled(num: int) -> Dataset:
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 250, 3 + 5 * (i % 4)).tolist() for i in range(num)]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100, *row[1:]] for row in rows]})


# Policies


def test_plain_text_with_packing_lowers_the_held_out_loss(base: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"Roses are {COLOURS[i % 4]}. " * (1 + i % 3)} for i in range(120)]
    data = write(tmp_path / "texts.jsonl", texts)
    flags = ("--text-key", "text", "--packing", "--max-tokens", "128", "--batch-size", "4", "--epochs", "3")
    outputs = [run("sft", base, data, tmp_path / f"at-{lr}", *flags, "--lr", lr) for lr in ("1e-9", "3e-3")]
    before, after = map(float, re.findall(r"held-out loss (\d+\.\d+) nats per text token", capsys.readouterr().out))
    assert after < before - 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(outputs[1]), AutoTokenizer.from_pretrained(outputs[1])
    ids = torch.tensor([tokenizer("Roses are red. ")["input_ids"] + [tokenizer.eos_token_id]])
    assert model(input_ids=ids, labels=ids).loss.item() < before - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at-1e-9", "at-3e-3", "texts.jsonl"]


def test_packed_rows_have_the_loss_of_the_same_rows_apart(base: Path, tmp_path: Path) -> None:
    from trl import pack_dataset

    rows = labelled(12)
    losses = []
    for packing in (False, True):
        options = options_for(base, packing=packing, batch_size=16, micro_batch_size=16)
        training = pack_dataset(rows, 64, "bfd") if packing else rows
        trainer = make_trainer(training, rows, spec_for(options, tmp_path), ignore)
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("position_ids" in batch) is packing
        trainer.model.eval()
        with torch.no_grad():
            losses.append(float(trainer.compute_loss(trainer.model, dict(batch))))
        assert losses[-1] == pytest.approx(trainer.measure(), abs=1e-5)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_model_whose_packed_rows_see_each_other_is_refused(base: Path, tmp_path: Path) -> None:
    rows = labelled(8)
    trainer = make_trainer(rows, rows, spec_for(options_for(base, packing=True), tmp_path), ignore)
    parts = [row[:8] for row in rows["input_ids"][2:4]]
    trainer.check_packing(parts)
    forward = trainer.model.model.forward
    trainer.model.model.forward = lambda *a, **k: forward(*a, **{**k, "position_ids": None})
    with pytest.raises(ConfigError, match="--packing: attention of LlamaForCausalLM"):
        trainer.check_packing(parts)


def test_chats_teach_the_assistant_and_not_the_user(base: Path, tmp_path: Path) -> None:
    def chat(question: str, answer: str) -> list[dict[str, str]]:
        turns = [("user", question), ("assistant", answer)] * 2
        return [{"role": role, "content": text} for role, text in turns]

    def loss(folder: Path, text: str, counted: str) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder)
        before = tokenizer(text[: text.index(counted)])["input_ids"]
        after = tokenizer(counted)["input_ids"]
        labels = [-100] * len(before) + after
        return float(model(input_ids=torch.tensor([before + after]), labels=torch.tensor([labels])).loss)

    tokenizer = AutoTokenizer.from_pretrained(base)
    data = write(tmp_path / "chats.jsonl", [{"messages": chat("what?", "nothing")} for _ in range(48)])
    flags = ("--batch-size", "8", "--epochs", "4", "--lr", "3e-3", "--max-tokens", "128")
    output = run("sft", base, data, tmp_path / "chatty", *flags)
    question = [loss(folder, "<user>what?", "what?") for folder in (base, output)]
    answer = [loss(folder, "<user>what?<assistant>nothing", "nothing") for folder in (base, output)]
    assert answer[1] < 0.5 < answer[0]
    assert question[1] > question[0] - 1


def test_lora_leaves_a_merged_model_and_the_adapter_that_it_has_in_it(base: Path, tmp_path: Path) -> None:
    import peft

    flags = ("--lora-rank", "4", "--lr", "1e-2", "--batch-size", "8", "--epochs", "1")
    output = run("sft", base, references(tmp_path / "rows.jsonl"), tmp_path / "lora", *flags)
    ids = torch.tensor([[10, 20, 30, 40]])
    merged = AutoModelForCausalLM.from_pretrained(output)(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(base)
    untrained = plain(ids).logits
    adapted = peft.PeftModel.from_pretrained(plain, output / "adapter")(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert not torch.allclose(merged, untrained, atol=1e-2)
    assert set(weights(output)) == set(weights(base))


def test_equal_options_give_equal_weights(base: Path, tmp_path: Path) -> None:
    data = references(tmp_path / "rows.jsonl")
    flags = ("--batch-size", "8", "--epochs", "1", "--lr", "1e-3", "--eval-every", "2")
    one, two, other = (
        weights(run("sft", base, data, tmp_path / str(i), *flags, "--seed", seed)) for i, seed in enumerate("778")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_bfloat16_and_checkpointed_gradients(base: Path, tmp_path: Path) -> None:
    flags = ("--batch-size", "8", "--epochs", "1", "--lr", "1e-3")
    data = references(tmp_path / "rows.jsonl")
    plain = weights(run("sft", base, data, tmp_path / "plain", *flags))
    spared = weights(run("sft", base, data, tmp_path / "spared", *flags, "--gradient-checkpointing"))
    assert all(torch.allclose(plain[name], spared[name], atol=1e-5) for name in plain)
    rounded = weights(run("sft", base, data, tmp_path / "rounded", *flags, "--dtype", "bfloat16"))
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    assert all(torch.allclose(plain[name], rounded[name].float(), atol=2e-2) for name in plain)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    code = "import sys; from oatlite_cli.main import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests that run in the background of a shell have Ctrl-C ignored, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def ends_well(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, output


def test_a_killed_training_goes_on_to_the_same_weights(base: Path, tmp_path: Path, capsys) -> None:
    data = references(tmp_path / "rows.jsonl", 200)
    flags = ["--batch-size", "4", "--epochs", "3", "--lr", "1e-3", "--save-every", "10"]
    arguments = ["sft", "--model", str(base), "--data", str(data), *flags, "--output"]
    whole = start(tmp_path, *arguments, "whole")
    ends_well(whole)
    killed = start(tmp_path, *arguments, "killed")
    checkpoints = tmp_path / "killed.checkpoints"
    deadline = time.monotonic() + LONG_S
    while not list(checkpoints.glob("step-*")) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists()
    assert list(checkpoints.glob("step-*"))
    output = ["--output", str(tmp_path / "killed")]
    assert "type --resume" in refused(capsys, *arguments[:-1], *output)
    other = ["--lr", "2e-3", "--resume", *output]
    assert "lr = 0.001, and not 0.002" in refused(capsys, *arguments[:-1], *other)
    with (checkpoints / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is going on" in refused(capsys, *arguments[:-1], "--resume", *output)
    weights_file = base / "model.safetensors"
    kept = weights_file.read_bytes()
    weights_file.write_bytes(kept[:-4] + bytes(4))
    try:
        assert "other weights" in refused(capsys, *arguments[:-1], "--resume", *output)
    finally:
        weights_file.write_bytes(kept)
    resumed = start(tmp_path, *arguments, "killed", "--resume")
    ends_well(resumed)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "rows.jsonl", "whole"]


def test_a_torn_checkpoint_does_not_count(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-100", ".writing-step-000090"):
        (tmp_path / "out.checkpoints" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match="leave --resume out"):
        check_resume(tmp_path / "out", resume=True)
    for step in (10, 20):
        (tmp_path / "out.checkpoints" / f"step-{step:06d}").mkdir()
    assert check_resume(tmp_path / "out", resume=True) == tmp_path / "out.checkpoints" / "step-000020"


class Unpickled:
    """Whoever unpickles it makes an empty file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self):
        return open, (self._path, "w")


class Stopped(Exception):
    """As a person would stop it."""


def stop_after_the_first_checkpoint(_: str, done: int, *__: object) -> None:
    if done > 1:
        raise Stopped


@contextlib.contextmanager
def spoilt(path: Path, content: bytes) -> Iterator[None]:
    kept = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(kept)


@pytest.mark.parametrize("zero_stage", [None, pytest.param(2, marks=pytest.mark.long)])
def test_a_damaged_checkpoint_is_named_and_nothing_in_one_is_executed(
    zero_stage: int | None, base: Path, tmp_path: Path
) -> None:
    def train(name: str, report: Report = ignore, **habits) -> dict[str, torch.Tensor]:
        options = options_for(base, batch_size=4, zero_stage=zero_stage)
        is_resumed = checkpoints_of(tmp_path / name).exists()
        finetune(labelled(16), labelled(5), options, Habits(**habits), tmp_path / name, report, resume=is_resumed)
        return weights(tmp_path / name)

    whole = train("whole")
    with pytest.raises(Stopped):
        train("stopped", stop_after_the_first_checkpoint, save_every=1)
    checkpoint = check_resume(tmp_path / "stopped", resume=True)
    assert checkpoint is not None
    manifest = checkpoint / MANIFEST
    listed = {record.name for record in read(checkpoint).files}
    assert listed == {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {MANIFEST}
    name = next(name for name in listed if name.endswith("optimizer.pt" if zero_stage is None else "optim_states.pt"))
    state = checkpoint / name
    turned = bytearray(state.read_bytes())
    turned[len(turned) // 2] ^= 1
    with spoilt(state, bytes(turned)), pytest.raises(CheckpointError, match=f"{name} is not what was written"):
        train("stopped")

    trap, poison = tmp_path / "trap", io.BytesIO()
    torch.save({"state": Unpickled(trap)}, poison)
    with spoilt(state, poison.getvalue()), spoilt(manifest, manifest.read_bytes()):
        rewritten = CheckpointWriter(tmp_path / "rewritten", read(checkpoint).step)
        rewritten.folder.parent.mkdir()
        rewritten.adopt(Path(shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns(MANIFEST))))
        rewritten.complete(read(checkpoint).step, rewritten.records, {})
        manifest.write_bytes((tmp_path / "rewritten" / checkpoint.name / MANIFEST).read_bytes())
        read(checkpoint).verify()
        with pytest.raises(Exception, match=r"[Ww]eights.only"):
            train("stopped")
    assert not trap.exists()

    resumed = train("stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# Several ranks


@pytest.mark.parametrize("zero_stage", [None, 2, 3])
def test_two_ranks_give_what_one_gives(zero_stage: int | None, base: Path, tmp_path: Path) -> None:
    rows = labelled(32)
    told: list[tuple[object, ...]] = []
    options = options_for(base, lr=1e-3)
    one = finetune(rows, labelled(5), options, Habits(), tmp_path / "one", ignore)
    two = dataclasses.replace(options, ranks=2, zero_stage=zero_stage)
    habits = Habits(eval_every=2)
    both = finetune(rows, labelled(5), two, habits, tmp_path / "two", lambda *told_now: told.append(told_now))
    assert both.held_out == pytest.approx(one.held_out, abs=1e-4)
    assert both.num_parameters == one.num_parameters
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 2e-4
    assert told[-1][:3] == ("policy", 4, 4)
    assert any("held-out loss" in str(line[3]) for line in told)


def test_what_a_rank_raises_comes_out_as_one_line(base: Path, tmp_path: Path) -> None:
    options = options_for(base, ranks=2, lr=1e38)
    with pytest.raises(ConfigError, match="lower --lr"):
        finetune(labelled(32), labelled(5), options, Habits(), tmp_path / "out", ignore)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "silence_s", "error", "words"),
    [
        (
            signal.SIGKILL,
            ranks.SILENCE_S,
            WorkerDied,
            "rank 1 was killed by SIGKILL; log: .*; to go on, type",
        ),
        (
            signal.SIGSTOP,
            15.0,
            DeadlineExceeded,
            "rank 1 was silent for 15 s; log: .*; .* the same with --resume",
        ),
    ],
)
def test_a_rank_that_is_lost_ends_the_training_with_its_number_its_log_and_how_to_go_on(
    number: int,
    silence_s: float,
    error: type[OatliteError],
    words: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "SILENCE_S", silence_s)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the log
    monkeypatch.setattr(tempfile, "tempdir", None)
    own = set(_descendants(os.getpid()))
    output = tmp_path / "out"
    hit: list[int] = []

    def lose(stage: str, done: int, total: int, figures: str) -> None:
        if steps_of(checkpoints_of(output)) and not hit:
            hit.append(min(p for p in set(_descendants(os.getpid())) - own if _rank_of(p) == "1"))
            os.kill(hit[0], number)

    options = options_for(base, ranks=2, epochs=200)
    with pytest.raises(error, match=words) as caught:
        finetune(labelled(32), labelled(5), options, Habits(save_every=1), output, lose)
    assert not Path(f"/proc/{hit[0]}").exists() and not output.exists()
    log = Path(re.search(r"log: (\S+);", str(caught.value))[1])
    assert log.is_file()
    assert ("in _run_module_as_main" in log.read_text()) == (number == signal.SIGSTOP), "its stacks"
    assert steps_of(checkpoints_of(output))


HANGING = """
import os
import sys
import threading
import time

def hang(self, args, state, control, **_):
    if state.global_step >= STEP:
        time.sleep(1e6)

def spoil():
    while not hasattr(sys.modules.get("oatlite.finetuning.trainers"), "Watcher"):
        time.sleep(0.05)
    sys.modules["oatlite.finetuning.trainers"].Watcher.on_step_begin = hang

if os.environ.get("RANK") == "1":
    threading.Thread(target=spoil, daemon=True).start()
"""


@pytest.mark.fault("3b")
@pytest.mark.parametrize(
    ("step", "bound", "bound_s", "words"),
    [
        (2, "BATCH_S", 15.0, "rank 1 has not begun another batch for 15 s; log: "),
        pytest.param(0, "LOAD_S", 45.0, "rank 1 has not begun a first batch for 45 s; log: ", marks=pytest.mark.long),
    ],
)
def test_a_rank_whose_main_thread_hangs_ends_the_training_with_its_stacks(
    step: int, bound: str, bound_s: float, words: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other threads go on, and so do its signs of life."""
    (tmp_path / "sitecustomize.py").write_text(HANGING.replace("STEP", str(step)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ranks, bound, bound_s)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the log
    monkeypatch.setattr(tempfile, "tempdir", None)
    own = set(_descendants(os.getpid()))
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=words) as caught:
        finetune(
            labelled(32),
            labelled(5),
            options_for(base, ranks=2, batch_size=16, epochs=9),
            Habits(),
            tmp_path / "out",
            ignore,
        )
    print(f"FAULT rank of a training hangs in step {step}, from its start to the end: {time.monotonic() - began:.1f} s")
    log = Path(re.search(r"log: (\S+);", str(caught.value))[1]).read_text()
    assert ", line 9 in hang" in log and "in _run_module_as_main" in log
    assert set(_descendants(os.getpid())) <= own and not (tmp_path / "out").exists()


def _rank_of(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((os.fsdecode(word)[5:] for word in words if word.startswith(b"RANK=")), None)
    return None


def test_a_folder_where_checkpoints_would_go_is_left_alone(base: Path, tmp_path: Path, capsys) -> None:
    data = references(tmp_path / "rows.jsonl", 20)
    mine = tmp_path / "out.checkpoints" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    capsys.readouterr()
    assert main(["sft", "--model", str(base), "--data", str(data), "--output", str(tmp_path / "out")]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_rank(number: int, code: int, base: Path, tmp_path: Path) -> None:
    data = references(tmp_path / "rows.jsonl", 400)
    arguments = ["sft", "--model", str(base), "--data", str(data), "--output", "out", "--learners", "2"]
    process = start(tmp_path, *arguments, "--batch-size", "2", "--epochs", "50")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("policy: "):
            break
    ranks = _descendants(process.pid)
    assert len(ranks) >= 3  # the launcher of ranks, and two of them
    process.send_signal(number)
    last = process.stdout.readlines()[-1]
    assert process.wait(30) == code
    assert last == f"oatlite: error: {'interrupted' if code == 130 else 'terminated'}\n"
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(FileNotFoundError):  # of one that has ended since it was found
        children += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [*children, *(found for child in children for found in _descendants(child))]


# Reward models


def test_a_reward_model_of_conversations_is_an_oracle_that_prefers_the_chosen(
    base: Path, tmp_path: Path, capsys
) -> None:
    def conversation(i: int, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": answer}]

    rows = [
        {"chosen": conversation(i, f"good {i % 7}"), "rejected": conversation(i, f"bad {i % 5}")} for i in range(80)
    ]
    data = write(tmp_path / "pairs.jsonl", rows)
    flags = ("--batch-size", "8", "--lr", "1e-3", "--epochs", "2", "--eval-every", "5")
    output = run("reward-model", base, data, tmp_path / "reward", *flags)
    summary, following = capsys.readouterr().out.splitlines()
    assert re.search(r"76 comparisons, held-out accuracy 1\.000 on 4", summary)
    assert "--set oracle.chat_template=true" in following
    oracle = RewardModelOracle(str(output), chat_template=True)
    prompt = raw_text([{"role": "user", "content": "question 99"}])
    good, bad = oracle.score([prompt] * 2, ["good 3", "bad 3"])
    assert good > bad


def test_a_reward_model_with_an_adapter_loads_and_stops_at_its_steps(base: Path, tmp_path: Path, capsys) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(40)]
    flags = ("--batch-size", "4", "--lora-rank", "4", "--lr", "1e-2", "--steps", "6")
    output = run("reward-model", base, write(tmp_path / "p.jsonl", rows), tmp_path / "reward", *flags)
    assert "policy" not in capsys.readouterr().err
    good, bad = RewardModelOracle(str(output)).score(["p50"] * 2, ["yes", "no"])
    assert good > bad
    assert (output / "adapter" / "adapter_config.json").is_file()


# What is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--packing"], "--packing is not for a network from scratch"),
        (["--batch-size", "4"], "--batch-size is not for a network from scratch"),
        (["--resume"], "--resume is not for a network from scratch"),
        (["--gpus", "0"], "--gpus is not for a network from scratch"),
        (["--eval-split", "test"], "--eval-split is not for a network from scratch"),
    ],
)
def test_flags_of_trained_models_are_refused_from_scratch(flags: list[str], words: str, tmp_path: Path, capsys) -> None:
    data = references(tmp_path / "rows.jsonl")
    train = ["--model", "tiny-llama", "--data", str(data), "--output", str(tmp_path / "out")]
    assert words in refused(capsys, "sft", *train, *flags)
    if flags != ["--packing"]:
        assert words in refused(capsys, "reward-model", *train, *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-tokens", "99"], "give --batch-size"),
        (["--vocab-size", "400"], "the model has a tokenizer"),
        (["--prompt-weight", "0.3"], "give 0 or 1"),
        (["--max-tokens", "600"], "more than the model's 512 positions"),
        (["--batch-size", "5", "--micro-batch-size", "2"], "give --batch-size 6"),
        (["--gpus", "3"], "give --gpus 0"),
        (["--text-key", "words"], "no column words"),
        (["--messages-key", "talk"], "no column talk"),
        (["--resume"], "no complete checkpoint"),
        (["--eval-split", "test"], "no split test"),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(
    flags: list[str], words: str, base: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    data = references(tmp_path / "rows.jsonl")
    train = ["sft", "--model", str(base), "--data", str(data), "--output", str(tmp_path / "out")]
    assert words in refused(capsys, *train, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_reward_model_is_no_policy_to_train(base: Path, tmp_path: Path, capsys) -> None:
    reward = save_model(tmp_path / "reward", reward=True)
    data = references(tmp_path / "rows.jsonl")
    said = refused(capsys, "sft", "--model", reward, "--data", str(data), "--output", str(tmp_path / "out"))
    assert "SequenceClassification" in said and "decoder language model" in said


# Weights & Biases


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it keeps what is beside the output ``out``."""
    for name in ("TMPDIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", secrets.token_hex(20))
    return tmp_path / "out.wandb"


def test_losses_go_to_weights_and_biases(base: Path, tmp_path: Path, wandb: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    data = references(tmp_path / "rows.jsonl")
    run("sft", base, data, tmp_path / "out", "--epochs", "1", "--batch-size", "8", "--eval-every", "2", "--wandb")
    assert "note:" not in capsys.readouterr().err
    [kept] = wandb.glob("wandb/offline-run-*/*.wandb")
    content = kept.read_bytes()
    for name in (b"train/loss", b"train/learning_rate", b"eval/loss", b"summary/held_out", b"micro_batch_size"):
        assert name in content, name
    run("sft", base, data, tmp_path / "other", "--epochs", "1", "--batch-size", "8")
    assert not (tmp_path / "other.wandb").exists()


@pytest.mark.fault("20")
@pytest.mark.parametrize("learners", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_server_of_weights_and_biases_that_never_answers_costs_a_training_ten_seconds_at_the_end(
    learners: int, base: Path, tmp_path: Path, wandb: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    flags = ["--epochs", "1", "--batch-size", "8", "--learners", str(learners), "--gpus", "0"]
    seconds = []
    with silent_server() as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        for output, more in ((tmp_path / "plain", []), (tmp_path / "out", ["--wandb"])):
            began = time.monotonic()
            run("sft", base, references(tmp_path / "rows.jsonl"), output, *flags, *more)
            seconds.append(time.monotonic() - began)
    assert "note: Weights & Biases: " in capsys.readouterr().err
    print(f"FAULT wandb hangs: sft takes {seconds[1]:.1f} s, and {seconds[0]:.1f} s without it")
    assert seconds[1] < seconds[0] + WANDB_CLOSE_S + 20
    assert [file for file in wandb.glob("wandb/*/*.wandb") if file.stat().st_size], "its records stay"
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)
