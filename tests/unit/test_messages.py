"""Messages: what goes in comes out, and nothing that breaks a declared limit comes out at all."""

import dataclasses
import json
import random
import re
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oatlite
from oatlite import messages
from oatlite.messages import (
    MESSAGES,
    BucketLoaded,
    BucketReady,
    CandidateBatch,
    CompareRequest,
    CudaIpcHandle,
    EncodeRequest,
    Failure,
    FeatureBatch,
    GenerateRequest,
    Hello,
    PreferenceBatch,
    Record,
    ShmHandle,
    Stage,
    Stop,
    WeightManifest,
    codec,
    cut,
    fields,
    join,
)
from oatlite.messages.codec import decode, encode
from oatlite.messages.fields import MalformedMessage

SOURCE_ROOT = Path(oatlite.__file__).parents[1]
RUN = "0123456789ab"
HEX = "ab" * 16


def i32(*values):
    return np.array(values, np.int32)


def i64(*values):
    return np.array(values, np.int64)


def f32(*values):
    return np.array(values, np.float32)


EXAMPLES = {
    type(message).__name__: message
    for message in (
        GenerateRequest(
            run_id=RUN,
            batch_id="1",
            policy_version=3,
            prompt_tokens=i32(5, 6, 7),
            prompt_lengths=i32(1, 2),
            seeds=np.array([0, 1, 2**64 - 1, 3], np.uint64),
            samplers=["policy", "reference", "policy", "policy"],
            is_last_of_version=True,
            temperature=1.0,
            top_p=0.9,
            top_k=0,
            max_new_tokens=8,
        ),
        CandidateBatch(
            run_id=RUN,
            batch_id="1",
            policy_version=3,
            samplers=["policy", "policy"],
            response_tokens=i32(9, 8, 0),
            response_lengths=i32(1, 2),
            sampler_logprobs=f32(-0.5, -1.0, -2.0),
            is_finished=np.array([False, True]),
            texts=["ü", "b"],
            generate_s=0.25,
            sleep_s=0.125,
            wake_s=0.5,
        ),
        CompareRequest(
            run_id=RUN,
            batch_id="2",
            purpose="train",
            prompts=["p", "q"],
            first=["a", "b"],
            second=["c", ""],
            references=["r", "s"],
        ),
        EncodeRequest(run_id=RUN, batch_id="3", prompts=["p", "q"], responses=["a", ""]),
        FeatureBatch(run_id=RUN, batch_id="3", features=f32(1, 2, np.nan, np.nan), num_features=2, encode_s=0.1),
        PreferenceBatch(
            run_id=RUN,
            batch_id="2",
            first_win=f32(0.25, np.nan),
            is_valid=np.array([True, False]),
            first_scores=f32(1.0, np.nan),
            second_scores=f32(2.0, 3.0),
            oracle_s=0.5,
            num_failures=1,
        ),
        WeightManifest(
            run_id=RUN,
            names=["a.weight", "a.bias", "b.weight"],
            dtypes=["float32", "float32", "float32"],
            ndims=i64(2, 1, 0),
            shapes=i64(2, 3, 4),
            buckets=i64(0, 0, 1),
            offsets=i64(0, 256, 512),
            buffer_bytes=1024,
        ),
        ShmHandle(run_id=RUN, segment=f"oatlite-{RUN}-{HEX}", num_bytes=1024),
        CudaIpcHandle(
            run_id=RUN,
            device_uuid="gpu",
            memory_handle=HEX,
            allocation_bytes=1024,
            allocation_offset=0,
            ref_counter_handle=HEX,
            ref_counter_offset=0,
            event_handle=HEX,
            event_sync_required=True,
            num_bytes=1024,
        ),
        BucketReady(run_id=RUN, version=3, bucket=0, is_last=True, checksum=HEX),
        BucketLoaded(run_id=RUN, version=3, bucket=0, checksum=HEX, load_s=0.25),
        Hello(run_id=RUN, role="actor-0", pid=7),
        Stage(run_id=RUN, role="actor-0", stage="idle", detail=""),
        Record(run_id=RUN, kind="step", body="{}"),
        Failure(run_id=RUN, role="actor-0", exit_code=3, message="gone", fix=""),
        Stop(run_id=RUN),
    )
}
every_message = pytest.mark.parametrize("message", EXAMPLES.values(), ids=EXAMPLES)


def specs_of(cls):
    return {field.name: field.metadata["spec"] for field in dataclasses.fields(cls)}


def kinds(message, *spec_types):
    return {name: spec for name, spec in specs_of(type(message)).items() if isinstance(spec, spec_types)}


def wire(message):
    return [bytes(frame) for frame in encode(message)]


def header_of(frames):
    return msgpack.unpackb(frames[0])


def with_header(frames, name, values):
    return [msgpack.packb([name, values]), *frames[1:]]


def tampered(original, **changes):
    """The frames of ``original`` with other values in its header, as an encoder without checks would send them."""
    frames = wire(original)
    name, values = header_of(frames)
    return with_header(frames, name, values | changes)


def with_array(message, name, data):
    """The frames of ``message`` with other bytes for its array ``name``."""
    frames = wire(message)
    frames[1 + list(kinds(message, fields.Array)).index(name)] = bytes(data)
    return frames


def assert_refused(frames, match=None):
    with pytest.raises(MalformedMessage, match=match):
        decode(frames)


def assert_equal(one, other):
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert type(a) is type(b) and a == b, field.name


# --------------------------------------------------------------------------- round trip


def value_strategy(spec):
    """Any value that a declared spec allows; lists and arrays stay short."""
    match spec:
        case fields.Text(max_bytes=limit):
            # A character takes four bytes at most; surrogates have no encoding.
            return st.text(st.characters(exclude_categories=["Cs"]), max_size=min(limit // 4, 40))
        case fields.Texts(each=each):
            return st.lists(value_strategy(each), max_size=4)
        case fields.Int(low=low, high=high):
            return st.integers(low, high)
        case fields.Float(low=low, high=high):
            return st.floats(max(low, -1e300), min(high, 1e300))
        case fields.Flag():
            return st.booleans()
        case fields.Array(dtype=dtype):
            return array_strategy(dtype, st.integers(0, 5))
    raise AssertionError(f"no strategy for {spec}")


def array_strategy(dtype, size):
    kind = np.dtype(dtype)
    if kind == np.bool_:
        element = st.booleans()
    elif kind.kind == "f":
        element = st.floats(-1e6, 1e6, width=32)
    else:
        element = st.integers(np.iinfo(kind).min, np.iinfo(kind).max)
    return size.flatmap(lambda n: st.lists(element, min_size=n, max_size=n)).map(lambda v: np.array(v, kind))


def sized(draw, spec, size):
    """A value for a list or array field with ``size`` entries."""
    if isinstance(spec, fields.Texts):
        return draw(st.lists(value_strategy(spec.each), min_size=size, max_size=size))
    return draw(array_strategy(spec.dtype, st.just(size)))


@st.composite
def any_message(draw):
    """A valid message of any type: every field from its spec, then those that must agree made to agree."""
    cls = draw(st.sampled_from(list(MESSAGES.values())))
    specs = specs_of(cls)
    values = {name: draw(value_strategy(spec)) for name, spec in specs.items()}

    def resize(size, *names):
        values.update({name: sized(draw, specs[name], size) for name in names})

    count = draw(st.integers(0, 4))
    lengths = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    if cls is GenerateRequest:
        values["prompt_lengths"] = i32(*lengths)
        resize(sum(lengths), "prompt_tokens")
        resize(count * draw(st.integers(0, 3)), "seeds", "samplers")
    elif cls is CandidateBatch:
        values["response_lengths"] = i32(*lengths)
        resize(sum(lengths), "response_tokens", "sampler_logprobs")
        resize(count, "is_finished", "texts", "samplers")
    elif cls is CompareRequest:
        values["purpose"] = draw(st.sampled_from(["train", "eval"]))
        resize(count, "prompts", "first", "second")
        resize(draw(st.sampled_from([0, count])), "references")
    elif cls is EncodeRequest:
        resize(count, "prompts", "responses")
    elif cls is FeatureBatch:
        values["num_features"] = draw(st.integers(1, 4))
        rows = draw(st.lists(st.floats(width=32, allow_infinity=False), max_size=3))
        values["features"] = np.repeat(f32(*rows), values["num_features"])
    elif cls is PreferenceBatch:
        resize(count, "is_valid")
        values["first_win"] = draw(
            st.lists(st.floats(0, 1, width=32), min_size=count, max_size=count).map(lambda v: f32(*v))
        )
        values["first_win"][~values["is_valid"]] = np.nan
        resize(draw(st.sampled_from([0, count])), "first_scores")
        resize(draw(st.sampled_from([0, count])), "second_scores")
    elif cls is WeightManifest:
        names = draw(st.lists(st.text("ab.", min_size=1, max_size=9), min_size=1, max_size=5, unique=True))
        values["names"], count = names, len(names)
        resize(count, "dtypes")
        values["ndims"] = i64(*draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
        values["shapes"] = np.abs(sized(draw, specs["shapes"], int(values["ndims"].sum())) // 2)
        values["buckets"] = np.cumsum(
            i64(0, *draw(st.lists(st.integers(0, 1), min_size=count - 1, max_size=count - 1)))
        )
        values["offsets"] = np.abs(sized(draw, specs["offsets"], count) // 2)
    return cls(**values)


@settings(max_examples=400, deadline=None)
@given(any_message())
def test_what_goes_in_comes_out(message):
    assert_equal(decode(wire(message)), message)


@every_message
def test_each_type_survives_and_its_arrays_are_views_that_cannot_be_written(message):
    decoded = decode(wire(message))
    assert_equal(decoded, message)
    for name in kinds(message, fields.Array):
        assert not getattr(decoded, name).flags.writeable
        assert not getattr(decoded, name).flags.owndata


def test_the_examples_are_all_there_is():
    assert set(EXAMPLES) == set(MESSAGES)
    declared = {cls for cls in vars(messages).values() if isinstance(cls, type) and issubclass(cls, messages.Message)}
    assert declared - {messages.Message} == set(MESSAGES.values())


def test_an_array_that_is_not_contiguous_goes_out_as_its_values():
    strided = np.arange(6, dtype=np.int32)[::2]
    sent = dataclasses.replace(EXAMPLES["GenerateRequest"], prompt_tokens=strided)
    assert decode(wire(sent)).prompt_tokens.tolist() == [0, 2, 4]


def test_join_and_cut_undo_each_other():
    parts = [i32(1, 2), i32(), i32(3)]
    flat, lengths = join(parts, "int32")
    assert flat.tolist() == [1, 2, 3] and lengths.tolist() == [2, 0, 1]
    assert [part.tolist() for part in cut(flat, lengths)] == [[1, 2], [], [3]]
    assert cut(*join([], "int32")) == []


# --------------------------------------------------------------------------- strictness: fields


def wrong_values(spec):
    """Values of other types than a spec's, and values just past its limits."""
    others = [None, 1.5, "x", b"x", True, 7, [], ["x"], [7], {}, {"x": 1}]
    match spec:
        case fields.Text(max_bytes=limit):
            return [v for v in others if not isinstance(v, str)] + ["x" * (limit + 1), "ü" * (limit // 2 + 1)]
        case fields.Texts(each=each):
            wrong = [v for v in others if not (v == [] or v == ["x"])]
            return [*wrong, [None], ["x", 1], [b"x"], ["x" * (each.max_bytes + 1)]]
        case fields.Int(low=low, high=high):
            return [v for v in others if type(v) is not int] + [low - 1, high + 1, float(low)]
        case fields.Float(low=low, high=high):
            wrong = [v for v in others if not isinstance(v, float)]
            past = [low - 1.0 if low > -1e300 else -np.inf, high + 1.0 if high < 1e300 else np.inf]
            return [*wrong, *past, float("nan"), float("inf")]
        case fields.Flag():
            return [v for v in others if v is not True] + [0, 1]
    raise AssertionError(f"no wrong values for {spec}")


@every_message
def test_a_header_field_of_the_wrong_type_or_over_its_limit_is_refused_at_both_ends(message):
    header_specs = kinds(message, fields.Text, fields.Texts, fields.Int, fields.Float, fields.Flag)
    for name, spec in header_specs.items():
        for value in wrong_values(spec):
            where = f"{type(message).__name__}.{name}: "
            assert_refused(tampered(message, **{name: value}), re.escape(where))
            with pytest.raises(MalformedMessage, match=re.escape(where)):
                encode(dataclasses.replace(message, **{name: value}))


@every_message
def test_arrays_of_another_size_or_type_are_refused(message):
    for name, spec in kinds(message, fields.Array).items():
        good = getattr(message, name)
        width = good.dtype.itemsize
        for data in (good.tobytes()[:-1], good.tobytes() + bytes(width - 1)):
            if len(data) % width:
                assert_refused(with_array(message, name, data), "are no array of")
        other = "float64" if spec.dtype != "float64" else "int32"
        for value in (good.astype(other), good.reshape(1, -1), good.tolist(), good.astype(good.dtype.newbyteorder())):
            if isinstance(value, np.ndarray) and value.dtype == good.dtype and value.ndim == 1:
                continue  # one byte has no order
            with pytest.raises(MalformedMessage, match="one-dimensional array"):
                encode(dataclasses.replace(message, **{name: value}))


@every_message
def test_a_missing_or_an_extra_field_or_frame_is_refused(message):
    frames = wire(message)
    name, values = header_of(frames)
    for field in values:
        less = {key: value for key, value in values.items() if key != field}
        assert_refused(with_header(frames, name, less), "wrong set of fields")
    assert_refused(with_header(frames, name, values | {"more": 1}), "wrong set of fields")
    for array in kinds(message, fields.Array):
        assert_refused(with_header(frames, name, values | {array: b""}), "wrong set of fields")
    assert_refused([*frames, b""], "wrong set of fields")
    if len(frames) > 1:
        assert_refused(frames[:-1], "wrong set of fields")


@pytest.mark.parametrize("name", ["Goodbye", "Message", "hello", "", "__class__", "oatlite.messages.Hello"])
def test_an_unknown_name_is_refused(name):
    frames = wire(EXAMPLES["Hello"])
    assert_refused(with_header(frames, name, header_of(frames)[1]), "unknown message")


@pytest.mark.parametrize(
    "header",
    [None, 1, "Hello", [], ["Hello"], [1, {}], [["Hello"], {}], ["Hello", []], ["Hello", {}, {}], {"Hello": {}}],
    ids=repr,
)
def test_a_header_of_another_shape_is_refused(header):
    assert_refused([msgpack.packb(header)], "no \\[name, fields\\]")


def test_booleans_that_are_not_zero_or_one_are_refused():
    assert_refused(with_array(EXAMPLES["CandidateBatch"], "is_finished", [0, 2]), "not booleans")
    assert_refused(with_array(EXAMPLES["PreferenceBatch"], "is_valid", [255, 1]), "not booleans")


def test_text_that_has_no_encoding_is_refused_where_it_is_sent():
    with pytest.raises(MalformedMessage, match="surrogate"):
        encode(dataclasses.replace(EXAMPLES["CompareRequest"], prompts=["\ud800", "q"]))


def test_sizes_over_the_limit_are_refused_before_anything_is_sent(monkeypatch):
    message = dataclasses.replace(EXAMPLES["Record"], body="x" * 5000)
    monkeypatch.setattr(codec, "MAX_HEADER_BYTES", 4096)
    with pytest.raises(MalformedMessage, match="header of"):
        encode(message)


def test_an_array_over_a_frame_is_refused_at_the_sender():
    huge = np.zeros(fields.MAX_FRAME_BYTES + 1, np.bool_)  # of untouched pages, which take no memory
    with pytest.raises(MalformedMessage, match="at most"):
        encode(dataclasses.replace(EXAMPLES["CandidateBatch"], is_finished=huge))


def changed(name, **changes):
    return dataclasses.replace(EXAMPLES[name], **changes)


INCONSISTENT = {
    "prompt lengths": changed("GenerateRequest", prompt_lengths=i32(1, 3)),
    "an empty prompt": changed("GenerateRequest", prompt_lengths=i32(3, 0)),
    "a negative prompt length": changed("GenerateRequest", prompt_lengths=i32(4, -1)),
    "a seed missing": changed("GenerateRequest", seeds=np.zeros(3, np.uint64)),
    "a sampler missing": changed("GenerateRequest", samplers=["policy"] * 3),
    "a prompt with fewer samples": changed("GenerateRequest", seeds=np.zeros(3, np.uint64), samplers=["policy"] * 3),
    "samples of no prompt": changed("GenerateRequest", prompt_tokens=i32(), prompt_lengths=i32()),
    "response lengths": changed("CandidateBatch", response_lengths=i32(1, 1)),
    "a negative response length": changed("CandidateBatch", response_lengths=i32(4, -1)),
    "a log-probability missing": changed("CandidateBatch", sampler_logprobs=f32(-1, -1)),
    "a log-probability that is NaN": changed("CandidateBatch", sampler_logprobs=f32(-1, np.nan, -1)),
    "an infinite log-probability": changed("CandidateBatch", sampler_logprobs=f32(-1, -np.inf, -1)),
    "a flag missing": changed("CandidateBatch", is_finished=np.array([True])),
    "a text missing": changed("CandidateBatch", texts=["a"]),
    "a response of no sampler": changed("CandidateBatch", samplers=["policy"]),
    "a first missing": changed("CompareRequest", first=["a"]),
    "a second missing": changed("CompareRequest", second=["a"]),
    "a reference missing": changed("CompareRequest", references=["a"]),
    "a validity missing": changed("PreferenceBatch", is_valid=np.array([True])),
    "a probability above 1": changed("PreferenceBatch", first_win=f32(1.01, 0)),
    "a probability below 0": changed("PreferenceBatch", first_win=f32(-0.01, 0)),
    "a valid probability that is NaN": changed("PreferenceBatch", first_win=f32(np.nan, 0)),
    "a score missing": changed("PreferenceBatch", first_scores=f32(1)),
    "a valid score that is NaN": changed("PreferenceBatch", second_scores=f32(np.nan, 1)),
    "a valid score that is infinite": changed("PreferenceBatch", second_scores=f32(np.inf, 1)),
    "a name twice": changed("WeightManifest", names=["a", "a", "b"]),
    "a name missing": changed("WeightManifest", names=["a", "b"]),
    "a dtype missing": changed("WeightManifest", dtypes=["float32"]),
    "an offset missing": changed("WeightManifest", offsets=i64(0, 1)),
    "a negative offset": changed("WeightManifest", offsets=i64(0, -256, 512)),
    "a negative size": changed("WeightManifest", shapes=i64(2, -3, 4)),
    "shapes": changed("WeightManifest", shapes=i64(2, 3)),
    "a negative ndim": changed("WeightManifest", ndims=i64(2, 2, -1)),
    "ndims that wrap around": changed("WeightManifest", ndims=i64(2**62, 2**62, 2**63 - 1), shapes=i64(*[1] * 7)),
    "a bucket that goes back": changed("WeightManifest", buckets=i64(0, 1, 0)),
    "a bucket left out": changed("WeightManifest", buckets=i64(0, 0, 2)),
    "buckets that wrap around": changed("WeightManifest", buckets=i64(0, 2**63 - 1, -(2**63))),
    "a first bucket that is not 0": changed("WeightManifest", buckets=i64(1, 1, 1)),
    "no tensor": changed(
        "WeightManifest", names=[], dtypes=[], ndims=i64(), shapes=i64(), buckets=i64(), offsets=i64()
    ),
}


@pytest.mark.parametrize("message", INCONSISTENT.values(), ids=INCONSISTENT)
def test_parts_that_do_not_agree_are_refused_at_both_ends(message, monkeypatch):
    with pytest.raises(MalformedMessage):
        encode(message)
    with monkeypatch.context() as careless:
        careless.setattr(type(message), "validate", lambda self: None)
        frames = wire(message)
        decode(frames)  # each field alone is fine
    assert_refused(frames)


# --------------------------------------------------------------------------- strictness: bytes


def msgpack_list(num_items):
    return b"\xdd" + num_items.to_bytes(4, "big")


BOMBS = {
    "nothing": [],
    "an empty header": [b""],
    "too many frames": [b"\x90"] * (codec.MAX_FRAMES + 1),
    "deep lists": [b"\x91" * 100_000 + b"\xc0"],
    "deep maps": [b"\x81\xa1a" * 100_000 + b"\xc0"],
    "a list of four billion": [msgpack_list(2**32 - 1)],
    "a map of four billion": [b"\xdf\xff\xff\xff\xff"],
    "a text of four billion": [b"\xdb\xff\xff\xff\xff"],
    "bytes of four billion": [b"\xc6\xff\xff\xff\xff"],
    "a list longer than any field": [msgpack_list(fields.MAX_ITEMS + 1) + bytes(fields.MAX_ITEMS + 1)],
    "two values": [b"\xc0\xc0"],
    "a timestamp": [b"\xd6\xff\x00\x00\x00\x00"],
    "an extension": [b"\xc7\x04\x2aabcd"],
    "text that is not UTF-8": [b"\x92\xa2\xff\xfe\x80"],
    "keys that are numbers": [b"\x92\xa5Hello\x81\x01\x01"],
    "keys that are lists": [b"\x92\xa5Hello\x81\x90\x01"],
}


@pytest.mark.parametrize("frames", BOMBS.values(), ids=BOMBS)
def test_a_header_made_to_hurt_is_refused(frames):
    assert_refused(frames)


def test_lists_within_lists_that_announce_much_take_little_memory():
    header = msgpack_list(4_000_000) * 50 + bytes(4_000_000)
    tracemalloc.start()
    try:
        assert_refused([header], "not msgpack")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20  # one such list alone takes 32 MB


def test_a_header_over_its_limit_is_not_parsed(monkeypatch):
    frames = wire(EXAMPLES["Hello"])
    monkeypatch.setattr(codec, "MAX_HEADER_BYTES", len(frames[0]) - 1)
    assert_refused(frames, "size of frames")


def mutated(generator, frames):
    """``frames`` with a few random bytes changed, cut out, doubled, or frames exchanged."""
    frames = [bytearray(frame) for frame in frames]
    for _ in range(generator.randint(1, 4)):
        frame = generator.choice(frames)
        place = generator.randrange(len(frame) + 1)
        match generator.randrange(5):
            case 0 if place < len(frame):
                frame[place] ^= 1 << generator.randrange(8)
            case 1 if place < len(frame):
                frame[place] = generator.choice(b"\x00\x01\x7f\x80\x90\xc0\xc1\xc4\xca\xcf\xd4\xdb\xdd\xdf\xff")
            case 2:
                del frame[place : place + generator.randint(1, 8)]
            case 3:
                frame[place:place] = frame[: generator.randint(1, 8)]
            case _:
                generator.shuffle(frames)
    return [bytes(frame) for frame in frames]


def refused(frames):
    try:
        decode(frames)
    except MalformedMessage:
        return True
    return False


def test_mutated_frames_are_refused_or_are_messages_and_never_raise_anything_else():
    generator = random.Random(0)
    originals = [wire(message) for message in EXAMPLES.values()]
    num_refused = sum(refused(mutated(generator, generator.choice(originals))) for _ in range(6000))
    assert 3000 < num_refused < 6000  # a change within a text or an array can be another good message


def test_random_frames_are_refused_and_never_raise_anything_else():
    generator = random.Random(1)
    for _ in range(3000):
        frames = [generator.randbytes(generator.randrange(40)) for _ in range(generator.randint(1, 4))]
        assert refused(frames)
        frames[0] = b"\x92\xa5Hello\x83" + frames[0]  # a good beginning
        assert refused(frames)


# --------------------------------------------------------------------------- nothing that can run

FORBIDDEN = re.compile(
    r"\b(pickle|cloudpickle|dill|marshal|shelve|recv_pyobj|send_pyobj|recv_serialized|unpickl\w*)\b"
    r"|shell\s*=\s*True|trust_remote_code[\"']?\s*[=:]\s*True|weights_only\s*=\s*False|allow_pickle\s*=\s*True"
    r"|\bos\.(system|popen)\b|(?<![\w.])(eval|exec|__import__|compile)\("
    r"|torch\.load\((?!.*weights_only=True)|\byaml\.(unsafe_|full_)?load\(|\bjoblib\b"
    r"|create_subprocess_shell|get(status)?output\(|[\"']tcp://|torch\.distributed\.run\b"
)


def test_nothing_in_the_source_could_run_what_comes_over_the_wire():
    files = [path for folder in ("oatlite", "cli") for path in sorted((SOURCE_ROOT / folder).rglob("*.py"))]
    assert len(files) > 30
    found = [
        f"{path.relative_to(SOURCE_ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.search(line.partition("#")[0])
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "data = marshal.loads(frame)",
        "socket.recv_pyobj()",
        "run(command, shell=True)",
        "load(path, trust_remote_code=True)",
        'options = {"trust_remote_code": True}',
        "torch.load(path, weights_only=False)",
        "exec(frame)",
        "x = eval(frame)",
        "os.system(command)",
        "torch.load(path)",
        "yaml.load(text)",
        "subprocess.getoutput(command)",
        'init_method="tcp://127.0.0.1:1234"',
    ],
)
def test_the_scan_finds_what_it_looks_for(line):
    assert FORBIDDEN.search(line)


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "spec.loader.exec_module(module)",
        "re.compile(words)",
        "retrieval(x)",
    ],
)
def test_the_scan_leaves_other_lines_alone(line):
    assert not FORBIDDEN.search(line)


@pytest.mark.parametrize(
    ("kind", "body", "why"),
    [
        ("note", "{", "not JSON"),
        ("note", "[" * 100_000, "not JSON"),
        ("note", '"words"', "no object"),
        ("note", "{}", "without text"),
        ("note", '{"text": 1}', "without text"),
        ("pair", "[]", "no object"),
        ("step", "{}", "another kind"),
        ("summary", '{"kind": "step"}', "another kind"),
        ("step", '{"kind": "step"}', "no step"),
        ("eval", '{"kind": "eval", "step": "1"}', "no step"),
        ("step", '{"kind": "step", "step": 1, "perf": 2}', "perf"),
    ],
)
def test_a_record_that_does_not_say_what_its_kind_promises_is_malformed(kind, body, why):
    with pytest.raises(MalformedMessage, match=why):
        Record(run_id=RUN, kind=kind, body=body).content()


def test_a_record_says_what_was_written():
    for kind, content in (
        ("note", {"text": "words"}),
        ("pair", {"prompt": "p"}),
        ("step", {"kind": "step", "step": 1, "perf": {"step_s": 1.0}}),
        ("summary", {"kind": "summary"}),
    ):
        assert Record(run_id=RUN, kind=kind, body=json.dumps(content)).content() == content
