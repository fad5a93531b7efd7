"""The pool of actors over real sockets and shared memory, against actors that die, lag, lie and come back."""

import contextlib
import dataclasses
import itertools
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from oatlite.engine import Sample
from oatlite.engine.model import load_checked
from oatlite.engine.states import Move, State, after
from oatlite.errors import DeadlineExceeded, WorkerDied
from oatlite.messages import (
    BucketLoaded,
    BucketReady,
    CandidateBatch,
    CompareRequest,
    GenerateRequest,
    Hello,
    PreferenceBatch,
    ShmHandle,
    Stop,
    WeightManifest,
    cut,
    join,
)
from oatlite.oracles.base import PreferenceOracle, Verdicts
from oatlite.sampling import SamplingOptions
from oatlite.transport import Hub, Spoke, address
from oatlite.weights import SHM_FOLDER, ShmBuffer, WeightExporter, WeightReader, plan_layout
from oatlite.workers.actor import Actor
from oatlite.workers.rest import Rest
from oatlite.workers.rollout import ActorPool, Deadlines
from oatlite.workers.turns import Turn

SOON_S = 30.0  # far more than anything here takes
MOMENT_S = 0.2  # for a message to arrive; a test that loses this race passes, it never fails
VOCAB_SIZE = 100
NUM_BUCKETS = 5
SHAPES = [(f"layers.{i}.weight", (8, 8)) for i in range(NUM_BUCKETS)]
SAMPLING = SamplingOptions(temperature=1.0, top_p=0.9, top_k=3, max_new_tokens=6)
DIE = "die"


def parameters_of(version):
    return {name: torch.full(shape, 10.0 * version + i) for i, (name, shape) in enumerate(SHAPES)}


# --------------------------------------------------------------------------- actors that follow a script


class Life:
    """One process of an actor, as the learner sees it: what it was sent and what it holds."""

    def __init__(self):
        self.received = []
        self.manifest = None
        self.reader = None
        self.version = 0
        self.loading = {}
        self.loaded = None

    def kinds(self):
        return [type(message) for message in self.received]


class ScriptedActor:
    """Does what an actor does, without an engine, in a thread.

    ``script(life number, message, answer)`` sees each message with the answer that is right (None where none is due)
    and returns what to send instead, as a list, or ``DIE``: then the socket is closed and a new life begins.
    """

    def __init__(self, where, name, run_id, script=None):
        self.name = name
        self.lives = []
        self.errors = []
        self.restart_now = False
        self.greeted = [threading.Event() for _ in range(5)]  # one per life
        self._where, self._run_id, self._script = where, run_id, script
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()
        return self

    def end(self):
        self._stop.set()
        self._thread.join(SOON_S)
        assert not self._thread.is_alive()
        if self.errors:
            raise self.errors[0]

    @property
    def life(self):
        return self.lives[-1]

    def received(self, kind):
        return [message for life in self.lives for message in life.received if isinstance(message, kind)]

    def _run(self):
        try:
            while not self._stop.is_set():
                self._live()
        except BaseException as error:
            self.errors.append(error)

    def _live(self):
        number = len(self.lives)
        self.lives.append(Life())
        spoke = Spoke(self._where, self.name, self._run_id)
        spoke.send(Hello(run_id=self._run_id, role=self.name, pid=1))
        self.greeted[number].set()
        try:
            while not self._stop.is_set():
                if self.restart_now:
                    self.restart_now = False
                    return
                message = spoke.receive(0.02)
                if message is None:
                    continue
                self.life.received.append(message)
                answer = self._answer(self.life, message)
                sent = [answer] if answer is not None else []
                if self._script is not None:
                    sent = self._script(number, message, answer)
                if sent == DIE:
                    return
                for each in sent:
                    spoke.send(each)
        finally:
            spoke.close(flush_s=1.0)

    def _answer(self, life, message):
        if isinstance(message, WeightManifest):
            life.manifest = message
        elif isinstance(message, ShmHandle):
            life.reader = WeightReader(life.manifest, message)
        elif life.reader is None:
            return None  # meant for the life before this one
        elif isinstance(message, BucketReady):
            return self._load(life, message)
        elif isinstance(message, GenerateRequest):
            assert message.policy_version == life.version
            return generated(message)
        elif isinstance(message, CompareRequest):
            return compared(message)
        return None

    def _load(self, life, offer):
        tensors, checksum = life.reader.read(offer.bucket)
        assert checksum == offer.checksum
        life.loading.update({name: tensor.clone() for name, tensor in tensors})
        if offer.is_last:
            life.version, life.loaded, life.loading = offer.version, life.loading, {}
        return BucketLoaded(
            run_id=self._run_id, version=offer.version, bucket=offer.bucket, checksum=checksum, load_s=0.5
        )


def response_of(prompt, seed):
    """What every actor here samples, so that an answer can be told from any other: (tokens, text)."""
    tokens = np.array([prompt[0], len(prompt), seed % VOCAB_SIZE][: 1 + seed % 3], np.int32)
    return tokens, f"{prompt.tolist()} {seed}"


def generated(request):
    prompts = cut(request.prompt_tokens, request.prompt_lengths)
    pairs = zip(np.repeat(np.arange(len(prompts)), request.num_candidates), request.seeds.tolist(), strict=True)
    samples = [response_of(prompts[i], seed) for i, seed in pairs]
    tokens, lengths = join([tokens for tokens, _ in samples], "int32")
    return CandidateBatch(
        run_id=request.run_id,
        batch_id=request.batch_id,
        policy_version=request.policy_version,
        samplers=request.samplers,
        response_tokens=tokens,
        response_lengths=lengths,
        sampler_logprobs=-tokens.astype(np.float32),
        is_finished=request.seeds % 2 == 0,
        texts=[text for _, text in samples],
        generate_s=float(len(samples)),
        sleep_s=0.25,
        wake_s=0.5,
    )


def compared(request, has_scores=True):
    """The share of the first response's length; a pair with an empty first response is not judged."""
    first, second = (np.array([len(text) for text in texts], np.float32) for texts in (request.first, request.second))
    scores = (first, second) if has_scores else (first[:0], second[:0])
    return PreferenceBatch(
        run_id=request.run_id,
        batch_id=request.batch_id,
        first_win=first / (first + second),
        is_valid=first > 0,
        first_scores=scores[0],
        second_scores=scores[1],
        oracle_s=float(len(first)),
        num_failures=len(request.prompts) if request.purpose == "eval" else 0,
    )


# --------------------------------------------------------------------------- the learner's side


@pytest.fixture
def world():
    with contextlib.closing(World()) as world:
        yield world


class World:
    """A pool with its hub and buffer, the actors that a test starts, and the order in which things happened."""

    def __init__(self):
        self.run_id = secrets.token_hex(6)
        self.folder = Path(tempfile.mkdtemp(prefix="oatlite-test-", dir="/tmp"))
        self.where = address(self.folder, "rollout-0")
        self.events = []
        self.actors = []
        self.pool = None

    def open(self, *scripts, deadline_s=SOON_S, elsewhere=()):
        """Start one actor per script, and a pool that knows them, and those that a test starts elsewhere."""
        layout = plan_layout(SHAPES, torch.float32, 256)
        assert layout.num_buckets == NUM_BUCKETS
        exporter = WeightExporter(layout, ShmBuffer(layout.buffer_bytes, self.run_id))
        fill = exporter.fill

        def noted_fill(bucket, parameter):
            self.events.append(("fill", bucket))
            return fill(bucket, parameter)

        exporter.fill = noted_fill
        self.hub = Hub(self.where, self.run_id)
        names = [f"actor-{i}" for i in range(len(scripts))]
        deadlines = Deadlines(start_s=deadline_s, generate_s=deadline_s, oracle_s=deadline_s, sync_s=deadline_s)
        self.pool = ActorPool(self.hub, [*names, *elsewhere], self.run_id, deadlines, exporter, VOCAB_SIZE)
        for name, script in zip(names, scripts, strict=True):
            self.add(name, script)
        return self.pool

    def ready(self, *scripts, deadline_s=SOON_S):
        """As ``open``, with all actors up and at version 1."""
        pool = self.open(*scripts, deadline_s=deadline_s)
        pool.wait_until_ready()
        pool.sync(1, self.source(1))
        return pool

    def add(self, name, script=None):
        self.actors.append(ScriptedActor(self.where, name, self.run_id, script).start())
        return self.actors[-1]

    def source(self, version):
        parameters = parameters_of(version)

        @contextlib.contextmanager
        def opened(names):
            allowed = {name: parameters[name] for name in names}
            yield allowed.__getitem__
            allowed.clear()  # what is read later is an error

        return opened

    def segments(self):
        return list(SHM_FOLDER.glob(f"oatlite-{self.run_id}-*"))

    def close(self):
        try:
            for actor in self.actors:
                actor.end()
        finally:
            if self.pool is not None:
                self.pool.close()
            shutil.rmtree(self.folder)
        assert self.segments() == []


PROMPTS = [np.arange(i + 1, 2 * i + 2, dtype=np.int32) for i in range(5)]
SEEDS = np.arange(100, 110, dtype=np.uint64).reshape(5, 2)
SAMPLERS = [["policy", "mixture"], ["mixture", "policy"], ["policy", "policy"], ["reference"] * 2, ["mixture"] * 2]


def generate(pool, count=5, **promises):
    return pool.generate(PROMPTS[:count], SEEDS[:count], SAMPLERS[:count], SAMPLING, **promises)


def assert_generated(candidates, count=5):
    assert len(candidates) == count
    for prompt, seeds, samplers, several in zip(PROMPTS, SEEDS.tolist(), SAMPLERS, candidates, strict=False):
        assert [candidate.sampler for candidate in several] == samplers
        for seed, candidate in zip(seeds, several, strict=True):
            tokens, text = response_of(prompt, seed)
            assert candidate.text == text
            assert candidate.tokens.tolist() == tokens.tolist()
            assert candidate.logprobs.tolist() == [-float(token) for token in tokens]
            assert candidate.is_finished is (seed % 2 == 0)


def assert_holds(actor, version):
    assert actor.life.version == version
    expected = parameters_of(version)
    assert set(actor.life.loaded) == set(expected)
    for name, tensor in actor.life.loaded.items():
        assert torch.equal(tensor, expected[name]), name


def at(kind, action):
    """A script: in the first life ``action(message, answer)`` on the messages of a kind, else what is right."""

    def script(number, message, answer):
        if number == 0 and isinstance(message, kind):
            return action(message, answer)
        return [answer] if answer is not None else []

    return script


def well(number, message, answer):
    return [answer] if answer is not None else []


def die(message, answer):
    return DIE


def silent(message, answer):
    return []


# --------------------------------------------------------------------------- requests


@pytest.mark.parametrize("num_actors", [1, 2])
@pytest.mark.parametrize("count", [5, 1, 0])
def test_prompts_are_split_over_actors_and_their_candidates_come_back_in_order(world, num_actors, count):
    pool = world.ready(*[well] * num_actors)
    candidates, seconds = generate(pool, count)
    assert_generated(candidates, count)
    asked = [len(request.prompt_lengths) for actor in world.actors for request in actor.received(GenerateRequest)]
    assert sum(asked) == count and max(asked, default=0) - min(asked, default=0) <= 1
    assert len(asked) == min(count, num_actors)
    assert seconds == 2.0 * max(asked, default=0)
    for actor in world.actors:
        for request in actor.received(GenerateRequest):
            assert request.policy_version == 1 and request.num_candidates == 2
            assert request.sampling == SAMPLING


TEXTS = {
    "prompts": ["a", "b", "c", "d", "e"],
    "first": ["x", "xx", "", "xxxx", "xxxxx"],
    "second": ["yyyyy", "yyyy", "yyy", "yy", "y"],
    "references": ["r1", "r2", "r3", "r4", "r5"],
}


@pytest.mark.parametrize("num_actors", [1, 2])
@pytest.mark.parametrize("has_references", [True, False])
def test_pairs_are_split_over_actors_and_their_verdicts_come_back_in_order(world, num_actors, has_references):
    pool = world.ready(*[well] * num_actors)
    sent = TEXTS if has_references else TEXTS | {"references": []}
    verdicts, seconds = pool.compare(
        TEXTS["prompts"], TEXTS["first"], TEXTS["second"], TEXTS["references"] if has_references else None
    )
    np.testing.assert_allclose(verdicts.first_win, np.array([1 / 6, 2 / 6, 0, 4 / 6, 5 / 6], np.float32))
    assert verdicts.is_valid.tolist() == [True, True, False, True, True]
    assert verdicts.first_scores.tolist() == [1, 2, 0, 4, 5]
    assert verdicts.second_scores.tolist() == [5, 4, 3, 2, 1]
    requests = [request for actor in world.actors for request in actor.received(CompareRequest)]
    assert {request.purpose for request in requests} == {"train"} and verdicts.num_failures == 0
    judged, _ = pool.compare(TEXTS["prompts"], TEXTS["first"], TEXTS["second"], purpose="eval")
    assert judged.num_failures == len(TEXTS["prompts"])
    assert len(requests) == num_actors and seconds == max(len(request.prompts) for request in requests)
    for name, texts in sent.items():
        assert [text for request in requests for text in getattr(request, name)] == texts


def test_scores_count_only_where_all_actors_give_them(world):
    without = at(CompareRequest, lambda message, answer: [compared(message, has_scores=False)])
    verdicts, _ = world.ready(well, without).compare(TEXTS["prompts"], TEXTS["first"], TEXTS["second"])
    assert len(verdicts.first_win) == 5
    assert verdicts.first_scores is None and verdicts.second_scores is None


def test_nothing_to_compare_asks_nobody(world):
    verdicts, seconds = world.ready(well).compare([], [], [])
    assert len(verdicts) == 0 and seconds == 0.0
    assert world.actors[0].received(CompareRequest) == []


def test_every_request_has_a_number_of_its_own(world):
    pool = world.ready(well, well)
    generate(pool)
    generate(pool)
    pool.compare(TEXTS["prompts"], TEXTS["first"], TEXTS["second"])
    requests = [r for actor in world.actors for r in actor.received((GenerateRequest, CompareRequest))]
    assert len({request.batch_id for request in requests}) == len(requests) == 6


def spoilt(**changes):
    """Send a spoilt answer before the right one."""

    def send(message, answer):
        values = {name: change(getattr(answer, name)) for name, change in changes.items()}
        return [dataclasses.replace(answer, **values), answer]

    return send


def with_first_token(value):
    def change(tokens):
        tokens = tokens.copy()
        tokens[0] = value
        return tokens

    return change


SPOILT_CANDIDATES = {
    "batch": spoilt(batch_id=lambda v: v + "0"),
    "an older version": spoilt(policy_version=lambda v: v - 1),
    "a newer version": spoilt(policy_version=lambda v: v + 1),
    "samplers": spoilt(samplers=lambda v: v[::-1]),
    "a token past the vocabulary": spoilt(response_tokens=with_first_token(VOCAB_SIZE)),
    "a negative token": spoilt(response_tokens=with_first_token(-1)),
    "one sample less": spoilt(
        samplers=lambda v: v[1:],
        response_lengths=lambda v: np.array([v[0] + v[1], *v[2:]], np.int32),
        is_finished=lambda v: v[1:],
        texts=lambda v: v[1:],
    ),
    "a response that is too long": spoilt(
        response_lengths=lambda v: np.array([7, *v[1:]], np.int32),
        response_tokens=lambda v: np.concatenate([np.zeros(7 - 2, np.int32), v]),
        sampler_logprobs=lambda v: np.concatenate([np.zeros(7 - 2, np.float32), v]),
    ),
    "another kind": lambda message, answer: [
        PreferenceBatch(
            run_id=message.run_id,
            batch_id=message.batch_id,
            first_win=np.zeros(1, np.float32),
            is_valid=np.ones(1, bool),
            first_scores=np.zeros(0, np.float32),
            second_scores=np.zeros(0, np.float32),
            oracle_s=0.0,
            num_failures=0,
        ),
        answer,
    ],
}


@pytest.mark.parametrize("action", SPOILT_CANDIDATES.values(), ids=SPOILT_CANDIDATES)
def test_candidates_that_do_not_fit_their_request_are_dropped_and_counted(world, action):
    assert response_of(PROMPTS[0], int(SEEDS[0, 0]))[0].size == 2  # what the one that is too long starts from
    pool = world.ready(at(GenerateRequest, action))
    candidates, _ = generate(pool)
    assert_generated(candidates)
    assert world.hub.dropped == Counter(unexpected=1)


SPOILT_VERDICTS = {
    "batch": spoilt(batch_id=lambda v: v + "0"),
    "one verdict less": spoilt(
        **dict.fromkeys(["first_win", "is_valid", "first_scores", "second_scores"], lambda v: v[1:])
    ),
}


@pytest.mark.parametrize("action", SPOILT_VERDICTS.values(), ids=SPOILT_VERDICTS)
def test_verdicts_that_do_not_fit_their_request_are_dropped_and_counted(world, action):
    pool = world.ready(at(CompareRequest, action))
    verdicts, _ = pool.compare(TEXTS["prompts"], TEXTS["first"], TEXTS["second"])
    assert verdicts.first_scores.tolist() == [1, 2, 0, 4, 5]
    assert world.hub.dropped == Counter(unexpected=1)


def test_a_stranger_cannot_answer_nor_say_hello(world):
    def wait_for_the_stranger(message, answer):
        expected = world.hub.dropped["unexpected"] + 2  # a Hello and an answer
        stranger = Spoke(world.where, "actor-9", world.run_id)
        stranger.send(Hello(run_id=world.run_id, role="actor-0", pid=1))
        wrong = with_first_token(99)(answer.response_tokens)
        stranger.send(dataclasses.replace(answer, response_tokens=wrong))
        wait_for(lambda: world.hub.dropped["unexpected"] >= expected)
        stranger.close()
        return [answer]

    pool = world.ready(at(GenerateRequest, wait_for_the_stranger))
    candidates, _ = generate(pool)
    assert_generated(candidates)
    assert_generated(generate(pool)[0])
    assert world.hub.dropped == Counter(unexpected=4)


# --------------------------------------------------------------------------- actors that die

WELCOME = [WeightManifest, ShmHandle, *[BucketReady] * NUM_BUCKETS]


@pytest.mark.parametrize("num_actors", [1, 2])
def test_an_actor_that_dies_over_a_request_gets_the_weights_and_the_whole_request_again(world, num_actors):
    pool = world.ready(*[well] * (num_actors - 1), at(GenerateRequest, die))
    candidates, _ = generate(pool)
    assert_generated(candidates)
    actor = world.actors[-1]
    first, second = actor.received(GenerateRequest)
    assert actor.life.kinds() == [*WELCOME, GenerateRequest]
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))
    assert_holds(actor, 1)
    if num_actors == 2:
        assert len(world.actors[0].lives) == len(world.actors[0].received(GenerateRequest)) == 1


def test_an_actor_that_dies_over_a_comparison_gets_it_again(world):
    pool = world.ready(at(CompareRequest, die))
    verdicts, _ = pool.compare(TEXTS["prompts"], TEXTS["first"], TEXTS["second"])
    assert verdicts.first_scores.tolist() == [1, 2, 0, 4, 5]
    assert world.actors[0].life.kinds() == [*WELCOME, CompareRequest]


@pytest.mark.fault("16")
def test_a_second_answer_to_a_request_is_dropped_and_counted(world):
    def twice(number, message, answer):
        if isinstance(message, GenerateRequest):
            return DIE if number == 0 else [answer, answer]
        return well(number, message, answer)

    pool = world.ready(twice)
    assert_generated(generate(pool)[0])
    assert_generated(generate(pool)[0])
    assert world.hub.dropped == Counter(unexpected=1)


PREDECESSOR = """
import sys
import numpy as np
from oatlite.messages import CandidateBatch, GenerateRequest, Hello
from oatlite.transport import Spoke

where, run_id = sys.argv[1:]
spoke = Spoke(where, "actor-0", run_id)
spoke.send(Hello(run_id=run_id, role="actor-0", pid=1))
while not isinstance(request := spoke.receive(60.0), GenerateRequest):
    assert request is not None
print("asked", flush=True)
sys.stdin.readline()
num = request.seeds.size
answer = CandidateBatch(
    run_id=run_id,
    batch_id=request.batch_id,
    policy_version=request.policy_version,
    samplers=request.samplers,
    response_tokens=np.full(num, 99, np.int32),
    response_lengths=np.ones(num, np.int32),
    sampler_logprobs=np.zeros(num, np.float32),
    is_finished=np.ones(num, np.bool_),
    texts=["of another"] * num,
    generate_s=1.0,
    sleep_s=0.0,
    wake_s=0.0,
)
spoke.send(answer)
spoke.close(flush_s=1.0)
print("answered", flush=True)
"""


@pytest.mark.fault("16")
@pytest.mark.parametrize("has_successor", [True, False])
def test_of_two_processes_that_answer_as_one_actor_the_later_one_is_heard(world, has_successor):
    """The earlier one was given up, and answers the same request when it goes on after all."""
    pool = world.open(elsewhere=["actor-0"])
    command = [sys.executable, "-c", PREDECESSOR, world.where, world.run_id]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as predecessor:

        def goes_on():
            print(file=predecessor.stdin, flush=True)
            assert predecessor.stdout.readline() == "answered\n"

        def meanwhile(message, answer):
            goes_on()
            time.sleep(MOMENT_S)
            return [answer]

        def is_asked():
            assert predecessor.stdout.readline() == "asked\n"
            if has_successor:
                world.add("actor-0", at(GenerateRequest, meanwhile))
            else:
                goes_on()

        pool.wait_until_ready()
        asked = threading.Thread(target=is_asked)
        asked.start()
        candidates, _ = generate(pool)
        asked.join(SOON_S)
    if has_successor:
        assert_generated(candidates)
    else:  # the same answer, from the same process, is one
        assert {candidate.text for several in candidates for candidate in several} == {"of another"}
    assert world.hub.dropped == Counter()


def test_a_second_answer_while_others_are_waited_for_is_dropped_and_counted(world):
    numbers = itertools.count(1)

    def late(message, answer):
        number = next(numbers)
        wait_for(lambda: world.hub.dropped["unexpected"] >= number)
        return [answer]

    pool = world.ready(at(GenerateRequest, lambda message, answer: [answer, answer]), at(GenerateRequest, late))
    assert_generated(generate(pool)[0])
    assert_generated(generate(pool)[0])
    assert world.hub.dropped == Counter(unexpected=2)


def test_an_actor_that_dies_between_two_requests_is_brought_back_for_the_next(world):
    pool = world.ready(well, well)
    assert_generated(generate(pool)[0])
    restart(world.actors[0])
    assert_generated(generate(pool)[0])
    assert_holds(world.actors[0], 1)
    restart(world.actors[0])
    pool.sync(2, world.source(2))
    assert_holds(world.actors[0], 2)
    assert_holds(world.actors[1], 2)
    assert len(world.actors[1].lives) == 1


def test_an_actor_that_dies_during_a_comparison_of_the_others_keeps_their_answers(world):
    """While one actor takes its weights again, the answer of the other one arrives."""
    is_loading, has_answered = threading.Event(), threading.Event()

    def lagging(number, message, answer):
        if number == 0 and isinstance(message, GenerateRequest):
            return DIE
        if number == 1 and isinstance(message, BucketReady) and message.bucket == 0:
            is_loading.set()
            assert has_answered.wait(SOON_S)
            time.sleep(MOMENT_S)
        return well(number, message, answer)

    def late(message, answer):
        assert is_loading.wait(SOON_S)
        has_answered.set()
        return [answer]

    pool = world.ready(lagging, at(GenerateRequest, late))
    candidates, _ = generate(pool)
    assert_generated(candidates)
    assert len(world.actors[1].received(GenerateRequest)) == 1
    assert world.hub.dropped == Counter()


def test_an_actor_that_dies_while_another_is_brought_back_is_brought_back_too(world):
    is_loading = threading.Event()

    def first(number, message, answer):
        if number == 0 and isinstance(message, GenerateRequest):
            return DIE
        if number == 1 and isinstance(message, BucketReady) and message.bucket == 0:
            is_loading.set()
            assert world.actors[1].greeted[1].wait(SOON_S)
            time.sleep(MOMENT_S)
        return well(number, message, answer)

    def second(message, answer):
        assert is_loading.wait(SOON_S)
        return DIE

    pool = world.ready(first, at(GenerateRequest, second))
    candidates, _ = generate(pool)
    assert_generated(candidates)
    for actor in world.actors:
        assert_holds(actor, 1)
        assert len(actor.lives) == 2


def test_an_actor_that_dies_while_another_one_starts_is_made_ready_again(world):
    pool = world.open(well, deadline_s=SOON_S)
    pool._actors.append("actor-1")  # one that is not there yet
    waiting = threading.Thread(target=pool.wait_until_ready, daemon=True)
    waiting.start()
    wait_for(lambda: world.actors[0].life.reader is not None)
    restart(world.actors[0])
    wait_for(lambda: world.actors[0].life.reader is not None)
    world.add("actor-1", well)
    waiting.join(SOON_S)
    assert not waiting.is_alive()
    pool.sync(1, world.source(1))
    for actor in world.actors:
        assert_holds(actor, 1)


def wait_for(condition):
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def restart(actor):
    """End an idle actor's life from outside, and return when the next one has said Hello."""
    number = len(actor.lives)
    actor.restart_now = True
    wait_for(lambda: len(actor.lives) > number and actor.greeted[number].is_set())


# --------------------------------------------------------------------------- weights


def test_a_sync_brings_every_bucket_to_every_actor(world):
    pool = world.ready(well, well)
    checksums = pool.sync(2, world.source(2))
    assert len(checksums) == NUM_BUCKETS == len(set(checksums))
    assert pool.policy_version == 2
    assert pool.reload_s == 0.5 * NUM_BUCKETS  # of the slowest actor, bucket by bucket
    for actor in world.actors:
        assert_holds(actor, 2)
        offers = [offer for offer in actor.received(BucketReady) if offer.version == 2]
        assert [offer.bucket for offer in offers] == list(range(NUM_BUCKETS))
        assert [offer.is_last for offer in offers] == [False] * (NUM_BUCKETS - 1) + [True]
        assert [offer.checksum for offer in offers] == checksums
        assert actor.life.kinds().count(WeightManifest) == actor.life.kinds().count(ShmHandle) == 1


def test_no_slot_is_refilled_before_every_actor_has_let_go_of_it(world):
    def slow(number, message, answer):
        """Look at the bucket again after a while: it must be what it was."""
        if isinstance(message, BucketReady):
            if message.bucket == 0:
                wait_for(lambda: ("fill", 1) in world.events)
            time.sleep(0.03)
            reader = world.actors[0].life.reader
            assert reader.read(message.bucket)[1] == message.checksum
            world.events.append(("slow", message.bucket))
        return well(number, message, answer)

    def fast(number, message, answer):
        if isinstance(message, BucketReady):
            world.events.append(("fast", message.bucket))
        return well(number, message, answer)

    pool = world.ready(slow, fast)
    world.events.clear()
    for version in (2, 3):
        pool.sync(version, world.source(version))
        for actor in world.actors:
            assert_holds(actor, version)
        happened = {event: i for i, event in enumerate(world.events)}
        assert len(happened) == len(world.events) == 3 * NUM_BUCKETS
        for bucket in range(2, NUM_BUCKETS):
            for who in ("slow", "fast"):
                assert happened[who, bucket - 2] < happened["fill", bucket]
        # And the next bucket is filled while the one before is read, or the second slot would be for nothing.
        assert happened["fill", 1] < happened["slow", 0]
        world.events.clear()


def test_an_actor_that_read_other_bytes_ends_the_run(world):
    def lie(message, answer):
        return [
            dataclasses.replace(answer, checksum="0" * 32) if message.version == 2 and message.bucket == 3 else answer
        ]

    pool = world.ready(well, at(BucketReady, lie))
    with pytest.raises(WorkerDied, match="actor-1 read other bytes of weights 2"):
        pool.sync(2, world.source(2))


def test_acknowledgements_of_something_else_do_not_count(world):
    def confused(message, answer):
        if message.bucket != 2:
            return [answer]
        others = [{"version": message.version - 1}, {"version": message.version + 1}, {"bucket": 1}, {"bucket": 3}]
        wrong = [dataclasses.replace(answer, checksum="0" * 32, **other) for other in others]
        return [*wrong, answer]

    pool = world.open(at(BucketReady, confused))
    pool.wait_until_ready()
    pool.sync(1, world.source(1))
    assert_holds(world.actors[0], 1)
    assert world.hub.dropped == Counter(unexpected=4)


@pytest.mark.fault("18")
@pytest.mark.parametrize("bucket", range(NUM_BUCKETS))
@pytest.mark.parametrize("answers_first", [False, True])
def test_an_actor_that_restarts_in_the_middle_of_a_sync_ends_up_with_all_of_it(world, bucket, answers_first):
    def fall(number, message, answer):
        if number == 0 and isinstance(message, BucketReady) and (message.version, message.bucket) == (2, bucket):
            if answers_first:
                world.actors[0].restart_now = True
                return [answer]
            return DIE
        return well(number, message, answer)

    def slow(number, message, answer):
        """Holds the last acknowledgement back until the other one is there again."""
        if isinstance(message, BucketReady) and message.version == 2 and message.is_last and number == 0:
            assert world.actors[0].greeted[1].wait(SOON_S)
            time.sleep(MOMENT_S)
        return well(number, message, answer)

    pool = world.ready(fall, slow)
    pool.sync(2, world.source(2))
    for actor in world.actors:
        assert_holds(actor, 2)
    assert len(world.actors[0].lives) == 2
    assert len(world.actors[1].lives) == 1
    assert world.actors[0].life.kinds()[-len(WELCOME) :] == WELCOME
    assert_generated(generate(pool)[0])


def test_an_actor_that_restarts_before_the_first_sync_is_welcome_without_weights(world):
    pool = world.open(at(GenerateRequest, die))
    pool.wait_until_ready()
    assert_generated(generate(pool)[0])
    assert world.actors[0].life.kinds() == [WeightManifest, ShmHandle, GenerateRequest]


# --------------------------------------------------------------------------- deadlines and the end


def act(pool, world, kind):
    if kind is GenerateRequest:
        generate(pool)
    elif kind is CompareRequest:
        pool.compare(TEXTS["prompts"], TEXTS["first"], TEXTS["second"])
    else:
        pool.sync(2, world.source(2))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (GenerateRequest, "has not answered a request to generate"),
        (CompareRequest, "has not answered a comparison"),
        (BucketReady, "has not loaded weights 2"),
    ],
)
def test_an_actor_that_does_not_answer_is_named(world, kind, words):
    pool = world.open(well, at(kind, silent))
    pool.wait_until_ready()
    pool._deadlines = dataclasses.replace(pool._deadlines, generate_s=5.0, oracle_s=5.0, sync_s=5.0)
    with pytest.raises(DeadlineExceeded, match=f"^actor-1 {words} in time") as caught:
        act(pool, world, kind)
    assert caught.value.exit_code == 7 and "timeouts" in caught.value.fix


def test_an_actor_that_is_not_there_is_named(world):
    pool = world.open(well, deadline_s=5.0)
    pool._actors.append("actor-1")
    with pytest.raises(DeadlineExceeded, match=r"^actor-1 has not started in time"):
        pool.wait_until_ready()


def test_an_actor_that_keeps_talking_does_not_move_the_deadline(world):
    def chatter(message, answer):
        return [dataclasses.replace(answer, batch_id="0")] * 100

    pool = world.ready(at(GenerateRequest, chatter))
    pool._deadlines = dataclasses.replace(pool._deadlines, generate_s=2.0)
    dropped = []
    world.hub.drop = lambda *message: (dropped.append(message), time.sleep(0.05))  # so that there is always one more
    with pytest.raises(DeadlineExceeded, match="actor-0"):
        generate(pool)
    assert 0 < len(dropped) < 100
    while world.hub.receive(MOMENT_S):  # a socket with unread messages takes long to close
        pass


def test_stop_reaches_every_actor_and_close_leaves_nothing(world):
    pool = world.ready(well, well)
    assert len(world.segments()) == 1
    pool.stop()
    for actor in world.actors:
        wait_for(lambda actor=actor: isinstance(actor.life.received[-1], Stop))
    pool.close()
    assert world.segments() == []
    world.pool = None


def test_stop_does_not_mind_an_actor_that_has_gone(world):
    pool = world.ready(well, well)
    world.actors[0].end()
    wait_for(lambda: stopped_quietly(pool))


def stopped_quietly(pool):
    """The socket of one that has ended is gone a moment later."""
    pool.stop()
    return pool._hub.dropped["undelivered"] > 0


# --------------------------------------------------------------------------- the actor that is used in runs


class FakeEngine:
    """Samples what the scripted actors sample, and holds weights."""

    def __init__(self):
        self.loading, self.loaded = None, None

    def generate(self, prompts, seeds, sampling, *, samplers):
        assert len(samplers) == len(prompts) and sampling == SAMPLING
        samples = [response_of(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [
            Sample(tokens=tokens, logprobs=-tokens.astype(np.float32), text=text, is_finished=seed % 2 == 0)
            for (tokens, text), seed in zip(samples, seeds, strict=True)
        ]

    def begin_load(self):
        self.loading = {}

    def open_weights(self, manifest, handle):
        self.reader = WeightReader(manifest, handle)

    def load_bucket(self, tensors):
        self.loading.update({name: tensor.clone() for name, tensor in tensors})

    def load_shared(self, bucket, checksum):
        return load_checked(self.reader, bucket, checksum, self.load_bucket)

    def finish_load(self):
        self.loaded, self.loading = self.loading, None


class FakeSleeper(FakeEngine):
    """Sleeps and wakes as an engine on a GPU does, by the same table, and notes it."""

    def __init__(self):
        super().__init__()
        self.state, self.moves = State.ASLEEP, []

    def _move(self, move):
        self.state = after(self.state, move)
        self.moves.append(move.value)

    def generate(self, *arguments, **options):
        self._move(Move.GENERATE)
        return super().generate(*arguments, **options)

    def begin_load(self):
        self._move(Move.BEGIN_LOAD)
        super().begin_load()

    def finish_load(self):
        self._move(Move.FINISH_LOAD)
        super().finish_load()

    def sleep(self, *, keeps_weights):
        self._move(Move.SLEEP if keeps_weights else Move.SLEEP_EMPTY)

    def wake(self):
        self._move(Move.WAKE)

    def wake_weights(self):
        self._move(Move.WAKE_WEIGHTS)

    def wake_cache(self):
        self._move(Move.WAKE_CACHE)


class LengthOracle(PreferenceOracle):
    """Prefers the longer; ``is_turned`` the shorter."""

    def __init__(self, *, is_turned=False):
        self.is_turned = is_turned
        self.failures = 0

    @property
    def num_failures(self):
        return self.failures

    def compare(self, prompts, first, second, references=None):
        self.failures += 1
        if self.is_turned:
            first, second = second, first
        firsts, seconds = (np.array([len(text) for text in texts], np.float32) for texts in (first, second))
        return Verdicts(first_win=firsts / (firsts + seconds), is_valid=firsts > 0)


class NoLifeline:
    def stage(self, stage, detail=""):
        pass

    @contextlib.contextmanager
    def doing(self, stage, detail=""):
        yield


class RealActor:
    """The actor of a run, with its loop in a thread, and an engine and an oracle that are quick."""

    def __init__(self, world, engine=None, rest=None):
        self.engine = engine or FakeEngine()
        self.error = None
        self._spoke = Spoke(world.where, "actor-0", world.run_id)
        spec = type("Spec", (), {"run_id": world.run_id, "role": "actor-0"})
        oracles = {"train": LengthOracle(), "eval": LengthOracle(is_turned=True)}
        self._actor = Actor(spec, self.engine, oracles, self._spoke, NoLifeline(), rest=rest)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self._actor.serve()
        except (WorkerDied, RuntimeError) as error:
            self.error = error
        finally:
            self._spoke.close(flush_s=1.0)

    def stop(self):
        """End it as if it had been told to, whatever it is sent."""
        self._actor._handle = self._spoke.receive = lambda *ignored: Stop(run_id="")
        assert self.ended()

    def ended(self):
        self._thread.join(SOON_S)
        return not self._thread.is_alive()


def test_the_actor_of_a_run_serves_the_pool(world):
    pool = world.open()
    pool._actors.append("actor-0")
    actor = RealActor(world)
    pool.wait_until_ready()
    for version in (0, 1, 2):
        pool.sync(version, world.source(version))
        assert all(torch.equal(actor.engine.loaded[name], value) for name, value in parameters_of(version).items())
        assert_generated(generate(pool)[0])
    verdicts, _ = pool.compare(TEXTS["prompts"], TEXTS["first"], TEXTS["second"])
    assert verdicts.is_valid.tolist() == [True, True, False, True, True] and verdicts.first_scores is None
    assert verdicts.num_failures == 1
    judged, _ = pool.compare(TEXTS["prompts"], TEXTS["first"], TEXTS["second"], purpose="eval")
    np.testing.assert_allclose(judged.first_win, 1 - verdicts.first_win, atol=1e-6)
    pool.stop()
    assert actor.ended() and actor.error is None


SYNC = ["wake its weights", "begin to load weights", "finish a load", "wake its cache"]


def sleeper(world, *, has_adapter=False):
    engine = FakeSleeper()
    return RealActor(world, engine, Rest(engine, Turn(world.folder / "gpu-0.lock"), has_adapter=has_adapter))


@pytest.mark.parametrize("has_adapter", [False, True])
def test_an_actor_sleeps_from_its_answer_to_the_next_request_or_sync(world, has_adapter):
    """An evaluation in between, and one of weights that are not the behaviour's, as with a sync now and then."""
    pool = world.open()
    pool._actors.append("actor-0")
    actor = sleeper(world, has_adapter=has_adapter)
    pool.wait_until_ready()
    pool.sync(0, world.source(0))
    assert_generated(generate(pool)[0])
    assert actor.engine.state is State.ASLEEP, "before its answer has come"
    pool.compare(TEXTS["prompts"], TEXTS["first"], TEXTS["second"])
    assert_generated(generate(pool, is_last_of_version=True)[0])
    assert actor.engine.state is (State.ASLEEP if has_adapter else State.EMPTY)
    pool.sync(1, world.source(1))
    assert all(torch.equal(actor.engine.loaded[name], value) for name, value in parameters_of(1).items())
    pool.sync(2, world.source(2))
    assert_generated(generate(pool)[0])
    last = "sleep" if has_adapter else "sleep without weights"
    again = ["begin to load weights", "finish a load", "generate", "sleep"]
    assert actor.engine.moves == [*SYNC, "generate", "sleep", "wake", "generate", last, *SYNC, *again]
    assert pool.sleep_s > 0 and pool.wake_s > 0
    pool.stop()
    assert actor.ended() and actor.error is None


def test_an_actor_that_was_promised_weights_samples_with_none(world):
    pool = world.open()
    pool._actors.append("actor-0")
    actor = sleeper(world)
    pool.wait_until_ready()
    pool.sync(0, world.source(0))
    generate(pool, is_last_of_version=True)
    pool._deadlines = dataclasses.replace(pool._deadlines, generate_s=MOMENT_S)
    with pytest.raises(DeadlineExceeded):
        generate(pool)
    assert actor.ended() and "cannot wake while it is asleep without weights" in str(actor.error)


@pytest.mark.parametrize("kind", [GenerateRequest, BucketReady])
def test_an_actor_that_came_back_while_the_learner_was_busy_serves_at_once(world, kind):
    """Its Hello waits in the hub, so the next request or bucket reaches it before its manifest does."""
    pool = world.open()
    pool._actors.append("actor-0")
    first = RealActor(world)
    pool.wait_until_ready()
    pool.sync(1, world.source(1))
    first.stop()
    second = RealActor(world)
    time.sleep(MOMENT_S)
    pool._deadlines = dataclasses.replace(pool._deadlines, generate_s=10.0, sync_s=10.0)
    act(pool, world, kind)
    assert_generated(generate(pool)[0])
    assert second.error is None
