"""Who may import what: read from the source, and seen in processes that import one module each."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = frozenset({"torch", "transformers", "vllm", "deepspeed", "zmq", "datasets", "wandb", "trl"})
TORCH = frozenset({"torch"})
HUGGING_FACE = frozenset({"torch", "transformers", "datasets"})

MAY_LOAD: dict[str, frozenset[str]] = {
    # By the longest prefix that fits: the heavy packages that importing a module may bring in.
    "oatlite": frozenset(),
    "oatlite.algorithm_checks": frozenset(),
    "oatlite.algorithms": TORCH,
    "oatlite.checkpoint": frozenset(),
    "oatlite.config": frozenset(),
    "oatlite.continuations": HUGGING_FACE,
    "oatlite.data": frozenset({"datasets"}),
    "oatlite.demo": frozenset(),
    "oatlite.demo.build": HUGGING_FACE,
    "oatlite.doctor": frozenset(),
    "oatlite.doctor.peers": frozenset({"torch", "zmq"}),
    "oatlite.dueling_bandit": TORCH,
    "oatlite.epistemic": TORCH,
    "oatlite.engine": frozenset({"vllm", "torch", "transformers", "zmq"}),
    "oatlite.errors": frozenset(),
    "oatlite.finetuning": HUGGING_FACE,
    "oatlite.fingerprints": frozenset(),
    "oatlite.fitting": TORCH,
    "oatlite.gpu_shares": frozenset(),
    "oatlite.hardware": frozenset(),
    "oatlite.inference": HUGGING_FACE,
    "oatlite.interrupts": frozenset(),
    "oatlite.launcher": frozenset(),
    "oatlite.layout_choice": frozenset({"torch", "transformers"}),
    "oatlite.layouts": TORCH,
    "oatlite.leftovers": frozenset(),
    "oatlite.loading": frozenset(),
    "oatlite.lora": TORCH,
    "oatlite.maths": TORCH,
    "oatlite.memory": frozenset(),
    "oatlite.messages": frozenset(),
    "oatlite.metrics": frozenset(),
    "oatlite.model_checks": frozenset(),
    "oatlite.model_size": frozenset(),
    "oatlite.models": frozenset({"torch", "transformers"}),
    "oatlite.next_token": TORCH,
    "oatlite.oracle_checks": frozenset(),
    "oatlite.oracles": frozenset({"torch", "transformers"}),
    "oatlite.output_file": frozenset(),
    "oatlite.output_folder": frozenset(),
    "oatlite.plots": frozenset(),
    "oatlite.preferences": frozenset({"datasets"}),
    "oatlite.preflight": frozenset(),
    "oatlite.quiet": HUGGING_FACE,
    "oatlite.reaper": frozenset(),
    "oatlite.resuming": frozenset(),
    "oatlite.reward_loss": HUGGING_FACE,
    "oatlite.reward_modeling": HUGGING_FACE,
    "oatlite.roles": frozenset(),
    "oatlite.run": frozenset({"zmq"}),
    "oatlite.run_folder": frozenset(),
    "oatlite.seeds": frozenset(),
    "oatlite.samplers": frozenset(),
    "oatlite.sampling": frozenset(),
    "oatlite.shared_attention": TORCH,
    "oatlite.sources": frozenset(),
    "oatlite.stacks": frozenset(),
    "oatlite.supervised": HUGGING_FACE,
    "oatlite.supervisor": frozenset({"zmq"}),
    "oatlite.testing": HEAVY - {"vllm", "deepspeed", "wandb", "trl"},
    "oatlite.tiny": HUGGING_FACE,
    "oatlite.trainer": frozenset({"torch", "deepspeed", "transformers"}),
    "oatlite.transport": frozenset({"zmq"}),
    "oatlite.weights": TORCH,
    "oatlite.workers": HEAVY - {"vllm", "deepspeed", "wandb", "trl"},
    "oatlite_cli": frozenset(),
}

ONLY_IN = {
    "zmq": "transport",
    "vllm": "engine",
    "deepspeed": "trainer",
    "wandb": "metrics",
    "trl": "finetuning",
    "mosec": "oracles",
}
ADAPTERS = frozenset({"transport", "weights", "engine", "trainer", "checkpoint", "metrics", "oracles", "data"})
MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "config": frozenset({"errors", "hardware"}),
    "maths": frozenset({"errors"}),
    "messages": frozenset({"errors", "sampling"}),
    "hardware": frozenset({"errors"}),
    "metrics": frozenset({"errors", "config"}),
    "algorithms": frozenset({"errors", "loading", "maths", "config", "messages"}),
}
MAY_IMPORT_WORKERS = frozenset({"workers", "supervisor", "roles", "launcher", "testing"})
AT_PARSE_TIME = frozenset({"config", "metrics", "errors", "hardware"})


@cache
def modules() -> dict[str, Path]:
    """Every module by its installed name."""
    found = {}
    for folder, package in (("oatlite", "oatlite"), ("cli", "oatlite_cli")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def allowed(module: str) -> frozenset[str]:
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next(MAY_LOAD[prefix] for prefix in prefixes if prefix in MAY_LOAD)


def imports(module: str, *, at_import_only: bool = False) -> Iterator[str]:
    """Full names that a module imports anywhere; with ``at_import_only`` not those inside functions."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and at_import_only:
            continue
        if isinstance(node, ast.If) and at_import_only and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def unit(name: str) -> str:
    """``engine`` of ``oatlite.engine.Engine``; empty outside of oatlite."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == "oatlite" else ""


# Read from the source


def test_every_module_has_a_row_of_its_own() -> None:
    units = {".".join(module.split(".")[:2]) if unit(module) else module.split(".")[0] for module in modules()}
    assert units - set(MAY_LOAD) == set(), "say what importing these may load"
    assert len(modules()) > 40


@pytest.mark.parametrize("module", modules())
def test_imports_point_downward(module: str) -> None:
    mine = unit(module)
    for name in imports(module):
        root, other = name.partition(".")[0], unit(name)
        if root in ONLY_IN:
            assert mine == ONLY_IN[root], f"only {ONLY_IN[root]} imports {root}"
        assert root not in {"pickle", "cloudpickle", "dill", "shelve"}, "nothing is ever unpickled"
        if mine:
            assert root != "oatlite_cli", "the library does not know its command line"
        if mine == other or not other or other not in {path.stem for path in (ROOT / "oatlite").iterdir()}:
            continue
        if mine in ADAPTERS:
            assert other not in ADAPTERS - {"weights"} | {"algorithms"}, f"adapters do not import {other}"
            assert other != "weights" or mine == "engine", "among adapters, only engine imports weights"
        if mine in MAY_IMPORT:
            assert other in MAY_IMPORT[mine], f"{mine} does not import {other}"
        if mine and other == "workers":
            assert mine in MAY_IMPORT_WORKERS, f"{mine} is below the workers"


@pytest.mark.parametrize("module", [module for module in modules() if module.startswith("oatlite.maths")])
def test_maths_is_torch_and_numpy(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(module)} - set(sys.stdlib_module_names)
    assert roots <= {"torch", "numpy", "oatlite"}


@pytest.mark.parametrize("module", [module for module in modules() if module.startswith("oatlite_cli")])
def test_commands_import_their_work_when_they_run(module: str) -> None:
    others = {unit(name) for name in imports(module, at_import_only=True) if name.startswith("oatlite.")}
    assert others - {""} <= AT_PARSE_TIME


def test_the_package_list_is_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {module for module, path in modules().items() if path.name == "__init__.py"}
    assert set(listed) == folders


# Seen in processes

PRELOADED = {
    "torch": ["torch"],
    "datasets": ["datasets"],
    # transformers loads its parts only when they are named.
    "transformers": ["transformers", "transformers.modeling_utils", "transformers.tokenization_utils_tokenizers"],
}

SEE = """
    # Import each module in a fork of a process that holds nothing but what all of them may load.
    import importlib, json, os, sys

    baseline, modules, heavy = json.load(sys.stdin)
    for name in baseline:
        importlib.import_module(name)
    seen = {}
    for module in modules:
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                importlib.import_module(module)
                answer = sorted(name for name in heavy if name in sys.modules)
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(writer, json.dumps(answer).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            seen[module] = json.load(pipe)
        os.wait()
    print("SEEN" + json.dumps(seen))
"""


@cache
def loaded_by(baseline: tuple[str, ...]) -> dict[str, list[str] | str]:
    names = [module for module in modules() if _baseline(module) == baseline and not module.endswith("__main__")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SEE)],
        input=json.dumps([baseline, names, sorted(HEAVY)]),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return json.loads(done.stdout.rpartition("SEEN")[2])


def _baseline(module: str) -> tuple[str, ...]:
    """What is imported before the fork, to spare each module those seconds: nothing that it may not load itself."""
    may = allowed(module)
    if "vllm" in may:
        return ()  # vLLM wants to be first
    heavy = [name for package, names in PRELOADED.items() if package in may for name in names]
    return ("pydantic", "numpy", "typer.main", "rich.live", *heavy)


@pytest.mark.parametrize("module", [module for module in modules() if not module.endswith("__main__")])
def test_a_module_alone_loads_what_it_may(module: str) -> None:
    loaded = loaded_by(_baseline(module))[module]
    assert isinstance(loaded, list), loaded
    assert set(loaded) <= allowed(module)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--dry-run", "--preset", "demo"]])
def test_the_command_line_answers_without_heavy_packages(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import json, sys; from oatlite_cli.main import main; code = main(sys.argv[1:]); "
        f"print('SEEN' + json.dumps([name for name in {sorted(HEAVY)} if name in sys.modules])); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "oatlite" in done.stdout
    assert json.loads(done.stdout.rpartition("SEEN")[2]) == []
