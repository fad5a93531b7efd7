"""``oatlite chat``: a conversation with a model, in a terminal or line by line through a pipe.

The engine is in this very process, unlike those of the other commands, so that each piece of an answer is shown when
it is sampled, and Ctrl-C stops the answer and not the engine.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol, TextIO

import numpy as np
import numpy.typing as npt

from oatlite.config.schema import Config
from oatlite.data import render
from oatlite.errors import ConfigError, OatliteError, WorkerDied
from oatlite.hardware import usable_cores
from oatlite.inference.inputs import check_model
from oatlite.inference.sampling import device_of, kept
from oatlite.lora import read_adapter
from oatlite.model_checks import max_positions
from oatlite.sampling import SamplingOptions
from oatlite.seeds import seed_of
from oatlite.sources import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from oatlite.engine import Engine

PROMPT = "> "
LONGEST_CONTEXT = 4096
LINE_BREAK = re.compile(r"\r\n|\r|\n")
COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """``config`` is resolved for inference. ``context_tokens`` (None: what the model takes, up to LONGEST_CONTEXT)
    bounds the conversation with its answer."""

    config: Config
    adapter: Path | None = None
    is_greedy: bool = False
    system: str | None = None
    context_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What goes to the engine: token ids (T,), how many it may answer, and how many earlier turns were dropped."""

    tokens: npt.NDArray[np.int32]
    max_new_tokens: int
    num_dropped: int


class Conversation:
    """Turns of a person and a model, as the model sees them.

    With a chat template they are messages; without one the text of the conversation goes on, one line after the other.
    Where the whole and an answer do not fit into ``context_tokens``, the oldest turns are dropped for good.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context_tokens: int, max_new_tokens: int, system: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens
        self._max_new_tokens = max_new_tokens
        self._before = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[tuple[str, str]] = []
        self.is_chat = getattr(tokenizer, "chat_template", None) is not None

    def ask(self, text: str) -> Turn:
        """The turn that ``text`` begins. Raises ConfigError where it alone leaves no room for an answer, or the
        template refuses it."""
        wanted = min(self._max_new_tokens, max(1, self._context_tokens // 4))
        for num_dropped in range(len(self._turns) + 1):
            tokens = self._encode(self._turns[num_dropped:], text)
            room = self._context_tokens - len(tokens)
            if room >= wanted or (num_dropped == len(self._turns) and room > 0):
                self._turns = self._turns[num_dropped:]
                return Turn(tokens=tokens, max_new_tokens=min(self._max_new_tokens, room), num_dropped=num_dropped)
        raise ConfigError(
            f"that has {len(tokens)} tokens, and the model takes {self._context_tokens} with its answer", "shorten it"
        )

    def answered(self, text: str, answer: str) -> None:
        self._turns.append((text, answer))

    def reset(self) -> None:
        self._turns = []

    def _encode(self, turns: Iterable[tuple[str, str]], text: str) -> npt.NDArray[np.int32]:
        if self.is_chat:
            messages = [*self._before]
            for user, assistant in turns:
                messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            messages.append({"role": "user", "content": text})
            whole = render(self._tokenizer, messages, "the conversation", awaits_answer=True)
        else:
            whole = "".join(f"{user}{answer}\n" for user, answer in turns) + text
        ids = self._tokenizer(whole, add_special_tokens=not self.is_chat, verbose=False)["input_ids"]
        return np.asarray(ids, np.int32)


class Streams(Protocol):
    """The part of :class:`oatlite.engine.Engine` that a conversation needs."""

    def stream(self, prompt: npt.NDArray[np.int32], seed: int, sampling: SamplingOptions) -> Iterator[str]: ...


def chat(options: ChatOptions) -> None:
    """Talk until the input ends. Raises OatliteError where the model cannot be used, and KeyboardInterrupt."""
    config, path = options.config, options.config.model.path
    assert path is not None
    if options.adapter is not None:
        read_adapter(options.adapter)
    model, tokenizer = check_model(config, path, "the model")
    limit = max_positions(model)
    context_tokens = options.context_tokens or int(min(limit, LONGEST_CONTEXT))
    if context_tokens > limit:
        raise ConfigError(f"--context-tokens {context_tokens}: the model takes {limit:.0f}", "lower it")
    if options.system is not None and getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(f"--system is for a chat template, and the tokenizer of {path} has none", "leave it out")
    conversation = Conversation(tokenizer, context_tokens, config.sampling.max_new_tokens, options.system)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        note(f"starting {path} ...")
    engine = _start(options, path, context_tokens)
    if not conversation.is_chat:
        note("the tokenizer has no chat template: each line is continued as plain text")
    if is_terminal:
        note(COMMANDS)
    sampling = SamplingOptions.of(config.sampling, is_greedy=options.is_greedy)
    talk = Talk(engine, conversation, sampling, config.run.seed)
    if is_terminal:
        talk.in_terminal(sys.stdout)
    else:
        talk.through_pipe(sys.stdin, sys.stdout)


class Talk:
    """Answers lines. The n-th answer since the start has a seed of its own, whatever was said before."""

    def __init__(self, engine: Streams, conversation: Conversation, sampling: SamplingOptions, seed: int) -> None:
        self._engine = engine
        self._conversation = conversation
        self._sampling = sampling
        self._seed = seed
        self._num_answers = 0

    def in_terminal(self, out: TextIO) -> None:
        """Until Ctrl-D or ``/exit``. Raises KeyboardInterrupt for Ctrl-C at the prompt."""
        import readline  # noqa: F401  # which input() edits lines with

        while True:
            try:
                text = input(PROMPT)
            except EOFError:
                out.write("\n")
                return
            if self._is_over(text):
                return
            if not text.strip() or text.strip() == "/reset":
                continue
            with _stoppable() as is_stopped:
                for piece in self.answer(text, is_stopped):
                    out.write(piece)
                    out.flush()
            out.write("\n")

    def through_pipe(self, lines: Iterable[str], out: TextIO) -> None:
        r"""One answer per line, in which a line break is written ``\n``; empty for a line that cannot be answered."""
        for line in lines:
            text = line.rstrip("\n")
            if self._is_over(text):
                return
            if not text.strip() or text.strip() == "/reset":
                continue
            answer = "".join(self.answer(text, lambda: False))
            out.write(LINE_BREAK.sub(r"\\n", answer) + "\n")
            out.flush()

    def _is_over(self, text: str) -> bool:
        if text.strip() == "/reset":
            self._conversation.reset()
            note("the conversation starts anew")
        return text.strip() == "/exit"

    def answer(self, text: str, is_stopped: Callable[[], bool]) -> Iterator[str]:
        """The pieces of the answer to ``text``; what was written before a stop stays in the conversation."""
        try:
            turn = self._conversation.ask(text)
        except ConfigError as error:
            note(str(error))
            return
        if turn.num_dropped:
            turns = "the oldest turn is" if turn.num_dropped == 1 else f"the {turn.num_dropped} oldest turns are"
            note(f"the conversation has outgrown the model: {turns} forgotten")
        pieces = self._engine.stream(
            turn.tokens,
            seed_of(self._seed, self._num_answers),
            replace(self._sampling, max_new_tokens=turn.max_new_tokens),
        )
        self._num_answers += 1
        said: list[str] = []
        for piece in pieces:
            said.append(piece)
            yield piece
            if is_stopped():
                break
        pieces.close()  # type: ignore[attr-defined]  # of a generator: the request is given up
        self._conversation.answered(text, "".join(said))


def note(text: str) -> None:
    """What is not an answer goes to standard error."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Within this, a first Ctrl-C is only noted."""
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _start(options: ChatOptions, path: str, context_tokens: int) -> Engine:
    """The engine, warmed up. What vLLM writes meanwhile goes to a log, which stays where it fails."""
    from oatlite.inference.process import open_engine

    config, device = options.config, device_of(options.config)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="oatlite-") as folder:
        log = Path(folder) / "log"
        try:
            with _output_to(log):
                engine = open_engine(config, path, options.adapter, device, len(usable_cores()), context_tokens)
                engine.warm_up(np.arange(1, 2, dtype=np.int32))
        except OatliteError:
            raise
        except Exception as error:
            raise WorkerDied(
                f"the engine of {path} failed: {type(error).__name__}: {first_line(error)}", f"log: {kept(log)}"
            ) from error
    return engine


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Standard output and error of this process into ``log``, libraries in C included."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in zip((1, 2), before, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
