"""The process that talks to Weights & Biases: JSON lines come in on standard input, the first says how to start.

It ends when its input does, whatever wandb does: so it cannot outlive the run. The learner kills it ``close_s`` later;
without a learner it ends soon by itself, with what wandb has started. Where wandb has not even started by then, because
its server does not answer, the records are kept offline.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

INIT_S = 30.0
PATIENCE_S = 5.0  # past what the learner has, which says so when it kills this process
ORPHANED_S = 2.0  # for what has come before the learner was killed
ORPHAN_POLL_S = 0.1
START_SHARE = 0.2  # of the time that it has at the end, for a start that has not come about yet
OURS = ("learner", "close_s", "offline_because")  # in the first line; the rest of it is for wandb


def main() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all processes of a run, it lets the step finish first
    first = json.loads(sys.stdin.readline())
    has_started = threading.Event()
    threading.Thread(target=_end_as_orphan, args=(first["learner"],), daemon=True).start()
    records = _records(first, has_started)
    offline_because = first.get("offline_because", "")
    start = {key: value for key, value in first.items() if key not in OURS}
    try:
        import wandb

        settings = _settings(wandb.Settings)
        try:
            run = wandb.init(**start, settings=settings, mode="offline" if offline_because else None)
        except Exception as error:
            offline_because = _one_line(error)
            run = wandb.init(**start, settings=settings, mode="offline")
        has_started.set()
        for record in records:
            if record["kind"] == "summary":
                run.summary.update(flat(record))
            else:
                run.log(flat(record), step=record["step"])
        run.finish()
    except Exception as error:
        print(_one_line(error), file=sys.stderr, flush=True)
        return 1
    if offline_because:
        print(f"kept offline, `wandb sync` uploads it: {offline_because}", file=sys.stderr, flush=True)
    return 1 if offline_because else 0


def _end_as_orphan(learner: int) -> None:
    while os.getppid() == learner:
        time.sleep(ORPHAN_POLL_S)
    time.sleep(ORPHANED_S)
    _end()


def _end() -> None:
    """Kills wandb-core too, which leads a group of its own: it would soon see that its parent is gone, but the process
    that it has for system metrics looks only every five seconds."""
    children: list[str] = []
    for of_thread in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            children += of_thread.read_text().split()
    for child in children:
        with contextlib.suppress(OSError):  # it does not lead a group, and ends with ours
            os.killpg(int(child), signal.SIGKILL)
    os._exit(1)


def _records(first: dict[str, Any], has_started: threading.Event) -> Iterator[dict[str, Any]]:
    """Records as they come, read on a thread from now on, so that the end of the input is noticed while wandb hangs."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    close_s = first["close_s"]

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        end = threading.Timer(close_s + PATIENCE_S, _end)
        end.daemon = True
        end.start()
        if "offline_because" in first or has_started.wait(close_s * START_SHARE):
            return
        if os.getppid() == first["learner"]:  # an orphan has no time for it
            _once_more_offline(first, list(iter(lines.get, None)), close_s * (1 - START_SHARE))

    threading.Thread(target=read, daemon=True).start()
    return (json.loads(line) for line in iter(lines.get, None))


def _once_more_offline(first: dict[str, Any], lines: list[str], close_s: float) -> None:
    """In the place of this process, whose main thread hangs: the same input again, to be kept offline."""
    first = first | {"close_s": close_s, "offline_because": "its server did not answer before the run ended"}
    with tempfile.TemporaryFile("w+") as file:
        file.write(json.dumps(first) + "\n")
        file.writelines(lines)
        file.flush()
        file.seek(0)
        os.dup2(file.fileno(), 0)
        os.execv(sys.executable, [sys.executable, "-m", __spec__.name])


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _settings(settings: Any) -> Any:
    wanted = {"silent": True, "console": "off", "init_timeout": INIT_S}
    return settings(**{key: value for key, value in wanted.items() if key in settings.model_fields})


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """``train/loss``, ``eval/win_rate``, ``perf/step_s``: the names under which wandb groups charts."""
    group = {"step": "train", "eval": "eval"}.get(record["kind"], "summary")
    named = {f"{group}/{key}": value for key, value in record.items() if key not in ("kind", "step", "perf")}
    perf = "perf" if group == "train" else f"{group}_perf"
    return named | {f"{perf}/{key}": value for key, value in record.get("perf", {}).items()}


if __name__ == "__main__":
    sys.exit(main())
