"""Python runs this in each process that has its folder on the path: the engine then does as a file tells it.

The file that ENGINE_MODE names holds ``fast``, ``slow`` (each of the engine's steps takes ENGINE_SLOW_S longer, so that
a test can meet it in the middle of a batch), ``raise`` (as with a broken driver), ``hang`` (as one that never answers,
while other threads go on), ``leave`` (as a library that ends its process with code 0), ``deaf`` (as one that ignores
what asks a worker to end, and slow) or, for an actor's role, ``halt ROLE`` (that actor stops itself as it is about to
load weights, so that a test can meet it in the middle of an update).
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

SLOW_S = float(os.environ.get("ENGINE_SLOW_S", "0.3"))
ENGINE, OURS = "vllm.v1.engine.llm_engine", "oatlite.engine"


def told() -> str:
    return Path(os.environ["ENGINE_MODE"]).read_text()


def wait_for_engine() -> None:
    while not hasattr(sys.modules.get(ENGINE), "LLMEngine"):
        time.sleep(0.05)
    engine = sys.modules[ENGINE].LLMEngine
    step = engine.step

    def told_step(self):
        mode = told()
        if mode == "deaf":
            ctypes.CDLL(None).signal(signal.SIGHUP, int(signal.SIG_IGN))  # Python's own may not, from this thread
        if mode in ("slow", "deaf"):
            time.sleep(SLOW_S)
        if mode == "raise":
            raise RuntimeError("CUDA error: as if")
        if mode == "hang":
            time.sleep(1e6)
        if mode == "leave":
            os._exit(0)
        return step(self)

    engine.step = told_step


def wait_for_ours() -> None:
    while not hasattr(sys.modules.get(OURS), "Engine"):
        time.sleep(0.05)
    engine = sys.modules[OURS].Engine
    begin_load = engine.begin_load

    def told_begin_load(self):
        if told() == f"halt {Path(sys.orig_argv[-1]).stem}":
            os.kill(os.getpid(), signal.SIGSTOP)
        return begin_load(self)

    engine.begin_load = told_begin_load


if "ENGINE_MODE" in os.environ and "oatlite.workers" in sys.orig_argv:
    for wait in (wait_for_engine, wait_for_ours):
        threading.Thread(target=wait, daemon=True).start()
