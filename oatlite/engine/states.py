"""What an engine may do when: its states, and the moves between them, as one table.

``READY`` generates. A sync takes it through ``LOADING``, in which the old weights go and the new ones come, bucket by
bucket. Where it shares a GPU with a learner it sleeps while that learns: ``ASLEEP`` with its weights in host memory, or
``EMPTY`` without any, where a sync of all of them comes next. A sync wakes the weights' memory alone, and the cache's
when they are loaded, so that the cache never lies beside what the load needs for a moment:

    ASLEEP or EMPTY -> WEIGHTS_AWAKE -> RELOADING -> RELOADED -> READY

Without a sync, ``ASLEEP`` wakes at once, and ``EMPTY`` cannot: there is nothing to sample with. An engine that fails in
a load, in falling asleep or in waking is ``TAINTED`` for good: part of it is new and part is old, or gone, and only a
fresh process helps.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class State(enum.Enum):
    READY = "ready"
    LOADING = "loading"
    ASLEEP = "asleep"
    EMPTY = "asleep without weights"
    WEIGHTS_AWAKE = "awake but for its cache"
    RELOADING = "loading with its cache asleep"
    RELOADED = "loaded with its cache asleep"
    TAINTED = "tainted"


class Move(enum.Enum):
    GENERATE = "generate"
    BEGIN_LOAD = "begin to load weights"
    LOAD = "load weights"
    FINISH_LOAD = "finish a load"
    SLEEP = "sleep"
    SLEEP_EMPTY = "sleep without weights"
    WAKE = "wake"
    WAKE_WEIGHTS = "wake its weights"
    WAKE_CACHE = "wake its cache"


MOVES: Mapping[Move, Mapping[State, State]] = {
    Move.GENERATE: {State.READY: State.READY},
    Move.BEGIN_LOAD: {State.READY: State.LOADING, State.WEIGHTS_AWAKE: State.RELOADING},
    Move.LOAD: {State.LOADING: State.LOADING, State.RELOADING: State.RELOADING},
    Move.FINISH_LOAD: {State.LOADING: State.READY, State.RELOADING: State.RELOADED},
    Move.SLEEP: {State.READY: State.ASLEEP},
    Move.SLEEP_EMPTY: {State.READY: State.EMPTY},
    Move.WAKE: {State.ASLEEP: State.READY},
    Move.WAKE_WEIGHTS: {State.ASLEEP: State.WEIGHTS_AWAKE, State.EMPTY: State.WEIGHTS_AWAKE},
    Move.WAKE_CACHE: {State.RELOADED: State.READY},
}
"""By move: from which states it is allowed, and the state that it leads to."""


def after(state: State, move: Move) -> State:
    """The state after ``move``. Raises RuntimeError, naming ``state`` and those wanted, where it is not allowed."""
    if state not in MOVES[move]:
        wanted = " or ".join(wanted.value for wanted in MOVES[move])
        raise RuntimeError(f"the engine cannot {move.value} while it is {state.value}; it has to be {wanted}")
    return MOVES[move][state]
