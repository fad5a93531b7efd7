"""``python -m oatlite.workers SPEC``: one worker process, whose output is its log."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from pathlib import Path

from oatlite.stacks import write_stacks_when_asked
from oatlite.workers.lifeline import Lifeline
from oatlite.workers.spec import END_SIGNAL, EXIT_FINISHED, WorkerSpec


def main(spec_path: str) -> int:
    spec = WorkerSpec.model_validate_json(Path(spec_path).read_text())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # see END_SIGNAL
    signal.signal(END_SIGNAL, signal.SIG_DFL)  # nohup ignores it
    faulthandler.enable()
    write_stacks_when_asked()
    logging.info("%s of run %s, process %d", spec.role, spec.run_id, os.getpid())
    lifeline = Lifeline(spec)
    try:
        if spec.kind == "learner":
            from oatlite.workers.learner_process import run_learner

            run_learner(spec, lifeline)
        else:
            from oatlite.workers.actor import run_actor

            run_actor(spec, lifeline)
    except BaseException as error:
        logging.exception("%s ends", spec.role)
        return lifeline.fail(error)
    lifeline.stage("stopped")
    lifeline.close()
    return EXIT_FINISHED


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries leave threads and atexit hooks that can hang; everything of ours is closed.
    os._exit(code)
