"""The ``oatlite`` command: its subcommands, and how a mistake or a failure becomes one line and an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

import oatlite
from oatlite.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, OatliteError, as_storage_error

Command = Callable[..., Any]


def _train() -> Command:
    from .train import train

    return train


def _resume() -> Command:
    from .resume import resume

    return resume


def _sft() -> Command:
    from .sft import sft

    return sft


def _reward_model() -> Command:
    from .reward_model import reward_model

    return reward_model


def _bandit() -> Command:
    from .bandit import bandit

    return bandit


def _serve_oracle() -> Command:
    from .serve_oracle import serve_oracle

    return serve_oracle


def _generate() -> Command:
    from .generate import generate

    return generate


def _chat() -> Command:
    from .chat import chat

    return chat


def _eval() -> Command:
    from .evaluate import evaluate

    return evaluate


def _label() -> Command:
    from .label import label

    return label


def _doctor() -> Command:
    from .doctor import doctor

    return doctor


COMMANDS: dict[str, tuple[Callable[[], Command], str]] = {
    "train": (_train, "Align a policy online: sample, compare, learn, sync."),
    "resume": (_resume, "Go on with a stopped run from its last checkpoint."),
    "sft": (_sft, "Train a policy on answers, conversations or plain text."),
    "reward-model": (_reward_model, "Train a reward model on preferences (Bradley-Terry)."),
    "generate": (_generate, "Sample responses to the prompts of a dataset into a file."),
    "chat": (_chat, "Talk to a model."),
    "eval": (_eval, "Judge a model's responses by any oracle."),
    "label": (_label, "Say which of two answers is better, by any oracle."),
    "doctor": (_doctor, "Check this machine before a run, and say what to mend."),
    "bandit": (_bandit, "Numerical experiments without a language model, in seconds."),
    "serve-oracle": (_serve_oracle, "Serve an oracle over HTTP, to oatlite and to oat."),
}
"""Each command's function, imported when it is asked for, and the line that stands for it in ``oatlite --help``."""


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """The Typer app, with the function of the command in ``arguments`` and names alone of the others.

    That spares ``oatlite --help`` the imports of every command, which would take it past half a second.
    """
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    app = typer.Typer(
        help="Align language models online on one box: a vLLM actor, an oracle, a DeepSpeed learner.",
        epilog="`oatlite train` runs a small demo, on GPUs the preset tldr; --dry-run says what would run.",
        context_settings={"help_option_names": ["-h", "--help"]},
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich" if asked in COMMANDS else None,
    )
    app.callback(invoke_without_command=True)(_root)
    for name, (load, line) in COMMANDS.items():
        if name == asked:
            app.command(name)(load())
        else:
            app.command(name, help=line)(_not_asked)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code; a person's mistake is told in one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        command = typer.main.get_command(app_for(arguments))
        code = command.main(arguments, prog_name="oatlite", standalone_mode=False)
    except typer.TyperException as error:
        return _fail(_usage(error), 2)
    except OatliteError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        full = as_storage_error(error)
        if full is None:
            raise
        return _fail(str(full), full.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", EXIT_INTERRUPTED)
    if code == EXIT_INTERRUPTED:  # so Typer takes Ctrl-C, without a word
        return _fail("interrupted", code)
    return code if isinstance(code, int) else 0


def run() -> None:
    # Read once, when torch loads: threads that spin while they wait make a busy machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Where it is installed, whatever looks at adapters loads it, and on a CPU it says what it lacks for 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said; Python's own end would answer with a traceback
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):  # and takes seconds over its libraries, where somebody waits
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _root(
    ctx: typer.Context,
    is_version_asked: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if is_version_asked:
        typer.echo(f"oatlite {oatlite.__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _not_asked() -> None:
    raise AssertionError("only the command that was asked for is ever called")


def _usage(error: typer.TyperException) -> str:
    """Typer's words on one line, with the nearest flag or the place to look."""
    from pydantic import ValidationError

    from oatlite.config.explain import must_be

    if isinstance(error.__cause__, ValidationError):
        error.message = must_be(error.__cause__)
    possible = list(getattr(error, "possibilities", None) or ())
    message = " ".join((error.message if possible else error.format_message()).split())
    context = getattr(error, "ctx", None)
    if possible:
        message += f"; did you mean {possible[0]}"
    elif not message.endswith("?"):
        message = f"{message.rstrip('.')}; see {context.command_path if context else 'oatlite'} --help"
    return f"{message[:1].lower()}{message[1:]}"


def _fail(message: str, code: int) -> int:
    print(f"oatlite: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    run()
