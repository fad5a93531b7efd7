"""The process that talks to Weights & Biases: JSON lines come in on standard input, the first says how to start.

It ends when its input does, whatever wandb does: so it cannot outlive the run. The learner kills it ``close_s`` later;
without a learner it ends soon by itself. Where wandb has not even started by then, because its server does not answer,
the records are kept offline.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

INIT_S = 30.0
PATIENCE_S = 5.0  # past what the learner has, which says so when it kills this process
ORPHANED_S = 3.0
START_SHARE = 0.2  # of the time that it has at the end, for a start that has not come about yet
OFFLINE_BECAUSE = "OATLITE_WANDB_OFFLINE_BECAUSE"


def main() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all processes of a run, it lets the step finish first
    first = sys.stdin.readline()
    start = json.loads(first)
    has_started = threading.Event()
    records = _records(first, start.pop("close_s"), has_started)
    offline_because = os.environ.pop(OFFLINE_BECAUSE, "")
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


def _records(first: str, close_s: float, has_started: threading.Event) -> Iterator[dict[str, Any]]:
    """Records as they come, read on a thread from now on, so that the end of the input is noticed while wandb hangs."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    parent = os.getppid()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        _end_after(close_s + PATIENCE_S, lambda: True)
        _end_after(ORPHANED_S, lambda: os.getppid() != parent)
        if OFFLINE_BECAUSE not in os.environ and not has_started.wait(close_s * START_SHARE):
            _once_more_offline(first, list(iter(lines.get, None)), close_s * (1 - START_SHARE))

    threading.Thread(target=read, daemon=True).start()
    return (json.loads(line) for line in iter(lines.get, None))


def _end_after(seconds: float, is_due: Callable[[], bool]) -> None:
    end = threading.Timer(seconds, lambda: os._exit(1) if is_due() else None)
    end.daemon = True
    end.start()


def _once_more_offline(first: str, lines: list[str], close_s: float) -> None:
    """In the place of this process, whose main thread hangs: the same input again, to be kept offline."""
    with tempfile.TemporaryFile("w+") as file:
        file.write(json.dumps(json.loads(first) | {"close_s": close_s}) + "\n")
        file.writelines(lines)
        file.flush()
        file.seek(0)
        os.dup2(file.fileno(), 0)
        environment = os.environ | {OFFLINE_BECAUSE: "its server did not answer before the run ended"}
        os.execve(sys.executable, [sys.executable, "-m", __spec__.name], environment)


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
