"""Which move an engine may make in which state, and what it asks of vLLM then."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import oatlite.engine as module
from oatlite.engine import Engine, EngineOptions, model
from oatlite.engine.model import LocalModel
from oatlite.engine.options import engine_arguments
from oatlite.engine.states import MOVES, Move, State, after
from oatlite.lora import AdapterOptions

OPTIONS: dict[str, Any] = {
    "path": "policy",
    "dtype": "bfloat16",
    "max_model_len": 64,
    "seed": 0,
    "device": "cuda",
    "gpu_memory_utilization": 0.3,
    "kv_cache_gib": 1.0,
    "threads": 1,
}
LEADS_TO = {
    (State.READY, Move.GENERATE): State.READY,
    (State.READY, Move.BEGIN_LOAD): State.LOADING,
    (State.LOADING, Move.LOAD): State.LOADING,
    (State.LOADING, Move.FINISH_LOAD): State.READY,
    (State.READY, Move.SLEEP): State.ASLEEP,
    (State.READY, Move.SLEEP_EMPTY): State.EMPTY,
    (State.ASLEEP, Move.WAKE): State.READY,
    (State.ASLEEP, Move.WAKE_WEIGHTS): State.WEIGHTS_AWAKE,
    (State.EMPTY, Move.WAKE_WEIGHTS): State.WEIGHTS_AWAKE,
    (State.WEIGHTS_AWAKE, Move.BEGIN_LOAD): State.RELOADING,
    (State.RELOADING, Move.LOAD): State.RELOADING,
    (State.RELOADING, Move.FINISH_LOAD): State.RELOADED,
    (State.RELOADED, Move.WAKE_CACHE): State.READY,
}


@pytest.mark.parametrize("move", Move)
@pytest.mark.parametrize("state", State)
def test_every_move_in_every_state(state: State, move: Move) -> None:
    if (state, move) in LEADS_TO:
        assert after(state, move) is LEADS_TO[state, move]
        return
    with pytest.raises(RuntimeError) as caught:
        after(state, move)
    text = str(caught.value)
    assert f"cannot {move.value} while it is {state.value};" in text
    for wanted in MOVES[move]:
        assert wanted.value in text.partition("it has to be")[2]


class FakeVllm:
    """Stands in for ``vllm.LLM`` on a GPU, which alone can sleep: it notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.failing: str | None = None

    def __getattr__(self, name: str) -> Callable[..., bool]:
        def call(**options: Any) -> bool:
            self.calls.append((name, options) if options else name)
            if name == self.failing:
                raise RuntimeError("CUDA error: out of memory")
            return True

        return call


class FakeModel:
    def load_weights(self, tensors: Any) -> set[str]:
        return {name for name, _ in tensors}


class SleepingEngine(Engine):
    """An engine over a fake vLLM."""

    def __init__(self, vllm: FakeVllm, **options: Any) -> None:
        self._llm: Any = vllm
        self._model = LocalModel(FakeModel(), None, "cpu")
        self._options = EngineOptions(**(OPTIONS | {"sleeps": True} | options))
        self._reference = self._swapped = None
        self.state = State.READY


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    made = FakeVllm()
    monkeypatch.setattr(model, "begin_reload", lambda *_: made.calls.append("begin"))
    monkeypatch.setattr(model, "finish_reload", lambda *_: made.calls.append("finish"))
    monkeypatch.setattr(model, "release", lambda *_: made.calls.append("load"))
    made.llm_engine = type("FakeInner", (), {"model_config": None})  # type: ignore[attr-defined]
    return made


def load(engine: Engine) -> None:
    engine.begin_load()
    engine.load_bucket([("weight", torch.zeros(1))])
    engine.finish_load()


@pytest.mark.parametrize(("keeps_weights", "level"), [(True, 1), (False, 2)])
def test_a_sync_into_a_sleeping_engine(vllm: FakeVllm, keeps_weights: bool, level: int) -> None:
    engine = SleepingEngine(vllm)
    engine.sleep(keeps_weights=keeps_weights)
    with pytest.raises(RuntimeError, match="cannot generate while it is asleep"):
        engine.generate([], [], module.WARM_UP)
    with pytest.raises(RuntimeError, match="cannot begin to load weights while it is asleep"):
        engine.begin_load()
    engine.wake_weights()
    with pytest.raises(RuntimeError, match="cannot wake its cache while it is awake but for its cache"):
        engine.wake_cache()
    load(engine)
    with pytest.raises(RuntimeError, match="loaded with its cache asleep; it has to be ready"):
        engine.generate([], [], module.WARM_UP)
    engine.wake_cache()
    assert engine.generate([], [], module.WARM_UP) == []
    woken = [("wake_up", {"tags": [tag]}) for tag in ("weights", "kv_cache")]
    reload = ["begin", "load", "finish", "reset_prefix_cache"]
    assert vllm.calls == [("sleep", {"level": level}), woken[0], *reload, woken[1]]


def test_waking_without_a_sync(vllm: FakeVllm) -> None:
    engine = SleepingEngine(vllm)
    engine.sleep(keeps_weights=True)
    engine.wake()
    assert vllm.calls == [("sleep", {"level": 1}), "wake_up"] and engine.state is State.READY
    engine.sleep(keeps_weights=False)
    with pytest.raises(RuntimeError, match="cannot wake while it is asleep without weights; it has to be asleep"):
        engine.wake()
    assert vllm.calls[2:] == [("sleep", {"level": 2})], "vLLM is not even asked"


def test_an_adapter_keeps_its_base(vllm: FakeVllm) -> None:
    engine = SleepingEngine(vllm, adapter=AdapterOptions(rank=8, alpha=16))
    with pytest.raises(RuntimeError, match="drop the weights that its adapter is for"):
        engine.sleep(keeps_weights=False)
    engine.sleep(keeps_weights=True)
    with pytest.raises(RuntimeError, match="was not started to sleep"):
        SleepingEngine(vllm, sleeps=False).sleep(keeps_weights=True)
    assert vllm.calls == [("sleep", {"level": 1})]


@pytest.mark.parametrize("failing", ["sleep", "wake_up"])
def test_an_engine_that_fails_in_between_is_tainted(vllm: FakeVllm, failing: str) -> None:
    engine = SleepingEngine(vllm)
    vllm.failing = failing
    if failing == "wake_up":
        engine.sleep(keeps_weights=True)
    act = engine.wake if failing == "wake_up" else partial(engine.sleep, keeps_weights=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        act()
    assert engine.state is State.TAINTED
    with pytest.raises(RuntimeError, match="while it is tainted"):
        engine.sleep(keeps_weights=True)


def test_an_engine_on_a_gpu_is_started_to_sleep_and_with_its_graphs() -> None:
    arguments = engine_arguments(EngineOptions(**OPTIONS, sleeps=True))
    assert arguments["enable_sleep_mode"] is True and arguments["gpu_memory_utilization"] == 0.3
    assert "enforce_eager" not in arguments, "CUDA graphs stay on"
    assert engine_arguments(EngineOptions(**OPTIONS))["enable_sleep_mode"] is False
    assert arguments["enable_prefix_caching"], "with which the samples of test_sampled_distributions are counted"
    on_cpu = engine_arguments(EngineOptions(**(OPTIONS | {"device": "cpu", "gpu_memory_utilization": None})))
    assert on_cpu["enforce_eager"] is True and "enable_sleep_mode" not in on_cpu
