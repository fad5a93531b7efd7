"""Python runs this in each process that has its folder on the path: the engine then does as a file tells it.

The file that ENGINE_MODE names holds ``fast``, ``slow`` (each of the engine's steps takes ENGINE_SLOW_S longer, so that
a test can meet it in the middle of a batch) or ``raise`` (as with a broken driver).
"""

import os
import sys
import threading
import time
from pathlib import Path

SLOW_S = float(os.environ.get("ENGINE_SLOW_S", "0.3"))
ENGINE = "vllm.v1.engine.llm_engine"


def wait_for_engine() -> None:
    while not hasattr(sys.modules.get(ENGINE), "LLMEngine"):
        time.sleep(0.05)
    engine = sys.modules[ENGINE].LLMEngine
    step = engine.step

    def told_step(self):
        mode = Path(os.environ["ENGINE_MODE"]).read_text()
        if mode == "slow":
            time.sleep(SLOW_S)
        if mode == "raise":
            raise RuntimeError("CUDA error: as if")
        return step(self)

    engine.step = told_step


if "ENGINE_MODE" in os.environ and "oatlite.workers" in sys.orig_argv:
    threading.Thread(target=wait_for_engine, daemon=True).start()
