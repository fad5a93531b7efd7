"""The weight buffer: its layout, its checksum, who may open it, and what a full disk does."""

import dataclasses
import errno
import itertools
import os
import secrets
import signal
import stat
import subprocess
import sys
import textwrap
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oatlite import weights
from oatlite.engine.model import load_checked
from oatlite.errors import StorageError, WorkerDied
from oatlite.messages import CudaIpcHandle, ShmHandle, WeightManifest
from oatlite.messages.codec import decode, encode
from oatlite.messages.fields import MalformedMessage
from oatlite.weights import (
    ALIGNMENT_BYTES,
    CHECKSUM_ROW_WORDS,
    SHM_FOLDER,
    Layout,
    Placement,
    ShmBuffer,
    WeightExporter,
    WeightReader,
    checksum,
    create_buffer,
    open_buffer,
    plan_layout,
    view,
)

RUN = secrets.token_hex(6)
ROW_BYTES = 8 * CHECKSUM_ROW_WORDS


@pytest.fixture
def buffers():
    """Creates buffers in shared memory, and leaves none behind."""
    created = []

    def create(num_bytes, run_id=RUN):
        created.append(ShmBuffer(num_bytes, run_id))
        return created[-1]

    yield create
    for buffer in created:
        buffer.close()
    assert list(SHM_FOLDER.glob(f"*{RUN}*")) == []


def path_of(buffer):
    return SHM_FOLDER / buffer.handle(RUN).segment


# --------------------------------------------------------------------------- layout

LLAMA = [
    ("model.embed_tokens.weight", (64, 16)),
    *(
        (f"model.layers.{layer}.{name}", shape)
        for layer in range(12)
        for name, shape in (
            ("self_attn.q_proj.weight", (16, 16)),
            ("mlp.gate_proj.weight", (32, 16)),
            ("input_layernorm.weight", (16,)),
        )
    ),
    ("model.norm.weight", (16,)),
]


@st.composite
def named_shapes(draw):
    """Parameters in the order of a model: module by module, some of them numbered layers."""
    modules = draw(
        st.lists(st.lists(st.lists(st.integers(0, 40), max_size=2), min_size=1, max_size=4), min_size=1, max_size=14)
    )
    is_numbered = draw(st.lists(st.booleans(), min_size=len(modules), max_size=len(modules)))
    shapes = [
        (f"model.layers.{m}.part{t}.weight" if numbered else f"model.module{m}.weight{t}", tuple(shape))
        for m, (tensors, numbered) in enumerate(zip(modules, is_numbered, strict=True))
        for t, shape in enumerate(tensors)
    ]
    return [*shapes, ("model.norm.weight", (3,))]


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
every_layout = given(named_shapes(), dtypes, st.integers(1, 20_000))


def module_of(name):
    """As the test names them: ``model.layers.3`` or ``model.module3``."""
    parts = name.split(".")
    return ".".join(parts[:3] if parts[1] == "layers" else parts[:-1])


def module_bytes(shapes, dtype):
    sizes = defaultdict(int)
    for name, shape in shapes:
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        sizes[module_of(name)] += -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return sizes


@settings(max_examples=200, deadline=None)
@every_layout
@example(LLAMA, torch.float32, 4096)
def test_every_tensor_has_an_aligned_place_of_its_own(shapes, dtype, bucket_bytes):
    layout = plan_layout(shapes, dtype, bucket_bytes)
    assert [(p.name, p.shape) for p in layout.placements] == shapes
    assert all(p.dtype == dtype and p.offset % ALIGNMENT_BYTES == 0 for p in layout.placements)
    assert all(p.num_bytes == int(np.prod(p.shape)) * dtype.itemsize for p in layout.placements)
    # A bucket and the next one lie in the buffer at the same time.
    for bucket in range(layout.num_buckets):
        present = sorted((p.offset, p.offset + p.num_bytes) for b in (bucket, bucket + 1) for p in layout.bucket(b))
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(present))
        assert present[-1][1] <= layout.buffer_bytes


@settings(max_examples=200, deadline=None)
@every_layout
@example(LLAMA, torch.float32, 4096)
def test_buckets_end_where_modules_end_and_are_as_few_as_their_size_allows(shapes, dtype, bucket_bytes):
    layout = plan_layout(shapes, dtype, bucket_bytes)
    buckets_of = defaultdict(set)
    for placement in layout.placements:
        buckets_of[module_of(placement.name)].add(placement.bucket)
    assert all(len(buckets) == 1 for buckets in buckets_of.values())
    assert sorted({p.bucket for p in layout.placements}) == list(range(layout.num_buckets))
    sizes = module_bytes(shapes, dtype)
    room = max(bucket_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES, *sizes.values())
    for bucket in range(1, layout.num_buckets):
        before, first = layout.bucket(bucket - 1), module_of(layout.bucket(bucket)[0].name)
        used = sum(sizes[module] for module in {module_of(p.name) for p in before})
        assert used <= room
        assert used + sizes[first] > room  # it would not have fitted into the one before


@settings(max_examples=200, deadline=None)
@every_layout
def test_the_buffer_is_at_most_twice_the_larger_of_bucket_and_largest_module(shapes, dtype, bucket_bytes):
    layout = plan_layout(shapes, dtype, bucket_bytes)
    sizes = module_bytes(shapes, dtype)
    slot = max(bucket_bytes, *sizes.values())
    assert layout.buffer_bytes <= (2 * slot if layout.num_buckets > 1 else sum(sizes.values()))


@settings(max_examples=100, deadline=None)
@every_layout
def test_a_layout_survives_its_manifest(shapes, dtype, bucket_bytes):
    layout = plan_layout(shapes, dtype, bucket_bytes)
    frames = [bytes(frame) for frame in encode(layout.manifest(RUN))]
    assert Layout.from_manifest(decode(frames)) == layout


@settings(max_examples=100, deadline=None)
@every_layout
def test_the_span_of_a_bucket_covers_its_tensors_and_nothing_of_the_next(shapes, dtype, bucket_bytes):
    layout = plan_layout(shapes, dtype, bucket_bytes)
    spans = [layout.span(bucket) for bucket in range(layout.num_buckets)]
    for bucket, (start, end) in enumerate(spans):
        assert start % 8 == 0 and (end - start) % 8 == 0 and end <= layout.buffer_bytes
        assert all(start <= p.offset and p.offset + p.num_bytes <= end for p in layout.bucket(bucket))
    for (start, end), (next_start, next_end) in itertools.pairwise(spans):
        assert end <= next_start or next_end <= start


def test_layers_are_told_apart_by_their_whole_number():
    names = [
        f"{module}.{part}.weight" for module in ("h.1", "h.10", "h.11", "h.2") for part in ("attention.q", "mlp.1")
    ]
    layout = plan_layout([(name, (64,)) for name in names], torch.float32, 256)
    assert [p.bucket for p in layout.placements] == [0, 0, 1, 1, 2, 2, 3, 3]


MANIFEST = WeightManifest(
    run_id=RUN,
    names=["a.weight", "a.bias", "b.weight"],
    dtypes=["float32"] * 3,
    ndims=np.array([2, 1, 1]),
    shapes=np.array([16, 4, 8, 64]),
    buckets=np.array([0, 0, 1]),
    offsets=np.array([0, 256, 512]),
    buffer_bytes=1024,
)


def test_the_manifest_that_the_next_tests_spoil_is_good():
    assert [p.shape for p in Layout.from_manifest(MANIFEST).placements] == [(16, 4), (8,), (64,)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"buffer_bytes": 767}, "b.weight reaches outside"),
        ({"offsets": np.array([0, 256, 1024])}, "b.weight reaches outside"),
        ({"offsets": np.array([0, 256, 2**62])}, "b.weight reaches outside"),
        ({"shapes": np.array([16, 4, 8, 129])}, "b.weight reaches outside"),
        ({"shapes": np.array([2**33, 2**33, 8, 64])}, "a.weight reaches outside"),
        ({"offsets": np.array([0, 260, 512])}, "a.bias reaches outside"),
        ({"offsets": np.array([0, 0, 512])}, "a.bias lies on"),
        ({"offsets": np.array([256, 0, 512])}, "a.bias lies on"),
        ({"dtypes": ["float32", "float64", "float32"]}, "unknown dtype float64"),
        ({"dtypes": ["float32", "__class__", "float32"]}, "unknown dtype"),
    ],
    ids=lambda value: str(value),
)
def test_a_manifest_that_reaches_outside_or_overlaps_is_refused(changes, words):
    with pytest.raises(MalformedMessage, match=words):
        Layout.from_manifest(dataclasses.replace(MANIFEST, **changes))


def test_a_buffer_of_another_size_than_the_layouts_is_refused(buffers):
    handle = buffers(2048).handle(RUN)
    with pytest.raises(MalformedMessage, match="for a layout of 1024"):
        WeightReader(MANIFEST, handle)


def test_a_bucket_that_does_not_exist_is_refused(buffers):
    reader = WeightReader(MANIFEST, buffers(1024).handle(RUN))
    for bucket in (-1, 2):
        with pytest.raises(MalformedMessage, match=f"bucket {bucket} of 2"):
            reader.read(bucket)


# --------------------------------------------------------------------------- checksum


def random_bytes(num_bytes, seed=0):
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_bytes", [256, ROW_BYTES, 3 * ROW_BYTES, 3 * ROW_BYTES + 512])
def test_the_checksum_shows_any_flipped_bit(num_bytes):
    data = random_bytes(num_bytes)
    before = checksum(data)
    generator = np.random.default_rng(0)
    places = [0, num_bytes - 1, *generator.integers(0, num_bytes, 60)]
    for place in places:
        for bit in (0, 7):
            data[place] ^= 1 << bit
            assert checksum(data) != before, (place, bit)
            data[place] ^= 1 << bit
    assert checksum(data) == before


def test_the_checksum_shows_rows_out_of_place():
    data = random_bytes(4 * ROW_BYTES)
    rows = data.view(4, ROW_BYTES)
    seen = {
        checksum(rows[list(order)].reshape(-1)) for order in ((0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0))
    }
    assert len(seen) == 4


def test_the_checksum_shows_a_row_of_the_bucket_before():
    old, new = random_bytes(4 * ROW_BYTES, seed=0), random_bytes(4 * ROW_BYTES, seed=1)
    mixed = new.clone()
    mixed[ROW_BYTES : 2 * ROW_BYTES] = old[ROW_BYTES : 2 * ROW_BYTES]
    assert checksum(mixed) != checksum(new)


def test_the_checksum_is_of_the_bytes_and_not_of_how_they_are_held():
    data = random_bytes(8 * ROW_BYTES)
    part = data[ROW_BYTES + 256 : 5 * ROW_BYTES]
    again = torch.frombuffer(bytearray(part.numpy().tobytes()), dtype=torch.uint8)
    assert checksum(part) == checksum(part.clone()) == checksum(again)
    assert checksum(part) == checksum(part.view(torch.float32).view(torch.uint8))
    assert checksum(part) != checksum(data[: part.numel()])


# --------------------------------------------------------------------------- handles


def test_a_segment_is_readable_by_its_owner_alone_and_all_of_it_is_reserved(buffers):
    buffer = buffers(1 << 20)
    status = path_of(buffer).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == 1 << 20 and status.st_blocks * 512 >= 1 << 20


def test_segments_have_names_that_cannot_be_guessed_and_are_gone_after_close(buffers):
    one, other = buffers(4096), buffers(4096)
    assert path_of(one) != path_of(other)
    assert path_of(one).name.startswith(f"oatlite-{RUN}-") and len(path_of(one).name) >= len(RUN) + 24
    one.close()
    assert not path_of(one).exists() and path_of(other).exists()
    one.close()


@pytest.mark.parametrize(
    "segment",
    [
        "../etc/passwd",
        "oatlite-../../etc/passwd",
        "oatlite-RUN-/../x",
        "/etc/passwd",
        "",
        ".",
        "oatlite-",
        "oatlite-RUN-",
        "oatlite-RUN-0123456789abcde",
        "oatlite-RUN-0123456789abcdef\n",
        "oatlite-RUN-0123456789abcdef\0",
        "oatlite-RUN-0123456789ABCDEF",
        "psm_0123456789abcdef",
        "sem.oatlite-0123456789abcdef",
    ],
)
def test_names_of_other_things_are_refused(segment):
    with pytest.raises(MalformedMessage, match="not the name of a segment of ours"):
        open_buffer(ShmHandle(run_id=RUN, segment=segment.replace("RUN", RUN), num_bytes=4096))


@pytest.mark.parametrize("field", ["memory_handle", "ref_counter_handle", "event_handle"])
@pytest.mark.parametrize("digits", ["abc", "xy", "ab-c"])
def test_a_handle_of_gpu_memory_that_is_no_number_is_refused_before_a_gpu_is_asked(field, digits):
    good = {"memory_handle": "ab", "ref_counter_handle": "ab", "event_handle": "ab"}
    handle = CudaIpcHandle(
        run_id=RUN,
        device_uuid="GPU-1",
        allocation_bytes=1024,
        allocation_offset=0,
        ref_counter_offset=0,
        event_sync_required=True,
        num_bytes=1024,
        **(good | {field: digits}),
    )
    with pytest.raises(MalformedMessage, match="not hexadecimal"):
        open_buffer(handle)


def test_the_segment_of_another_run_is_refused(buffers):
    handle = buffers(4096, run_id=f"{RUN}0").handle(RUN)
    with pytest.raises(MalformedMessage, match="another run"):
        open_buffer(handle)


def test_a_segment_that_is_not_there_is_refused():
    handle = ShmHandle(run_id=RUN, segment=f"oatlite-{RUN}-{'0' * 16}", num_bytes=4096)
    with pytest.raises(MalformedMessage, match="No such file"):
        open_buffer(handle)


@pytest.mark.parametrize("num_bytes", [1, 4095, 4097, 8192])
def test_a_handle_that_lies_about_the_size_is_refused(buffers, num_bytes):
    handle = dataclasses.replace(buffers(4096).handle(RUN), num_bytes=num_bytes)
    with pytest.raises(MalformedMessage, match="segment of 4096 bytes"):
        open_buffer(handle)


def test_a_link_is_not_followed(buffers):
    target = path_of(buffers(4096))
    link = SHM_FOLDER / f"oatlite-{RUN}-{'1' * 16}"
    link.symlink_to(target)
    try:
        with pytest.raises(MalformedMessage, match="cannot open"):
            open_buffer(ShmHandle(run_id=RUN, segment=link.name, num_bytes=4096))
    finally:
        link.unlink()


def test_a_segment_of_somebody_else_is_refused(buffers, monkeypatch):
    handle = buffers(4096).handle(RUN)
    monkeypatch.setattr(weights.os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(MalformedMessage, match="segment of"):
        open_buffer(handle)


# --------------------------------------------------------------------------- a full disk


def test_a_full_disk_is_a_storage_error_that_leaves_nothing(monkeypatch):
    """Simulated: what the system says where nothing is left."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights.os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="needs 4096") as caught:
        create_buffer("shm", 4096, RUN, torch.device("cpu"))
    assert caught.value.exit_code == 5 and "sync.bucket_mib" in caught.value.fix
    assert list(SHM_FOLDER.glob(f"*{RUN}*")) == []


def test_a_buffer_larger_than_all_memory_is_a_storage_error_that_leaves_nothing():
    status = os.statvfs(SHM_FOLDER)
    too_much = status.f_blocks * status.f_frsize + (1 << 30)
    with pytest.raises(StorageError, match=f"needs {too_much}"):
        ShmBuffer(too_much, RUN)
    assert list(SHM_FOLDER.glob(f"*{RUN}*")) == []


FULL_DISK = """
    import os, sys
    from pathlib import Path
    import oatlite.weights as weights
    from oatlite.errors import StorageError

    weights.SHM_FOLDER = Path(sys.argv[1])
    first = weights.ShmBuffer(1 << 20, "first")
    try:
        weights.ShmBuffer(1 << 20, "second")
    except StorageError as error:
        print(error)
    first.data.fill_(7)  # what is reserved can be written to the last byte
    print(sorted(p.name.split("-")[1] for p in weights.SHM_FOLDER.iterdir()), int(first.data.sum()))
"""


@pytest.mark.fault("19")
def test_on_a_small_disk_the_second_buffer_is_refused_and_the_first_is_whole(tmp_path):
    """A real tmpfs of 1.5 MiB, in a mount namespace of its own."""
    command = f'mount -t tmpfs -o size=1536k none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    unshare = ["unshare", "--mount", "--map-root-user"]
    try:
        subprocess.run([*unshare, "sh", "-c", f"mount -t tmpfs none {tmp_path}"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine allows no tmpfs of our own")
    done = subprocess.run([*unshare, "sh", "-c", command, textwrap.dedent(FULL_DISK)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refusal, left = done.stdout.splitlines()
    assert "bytes free and the weight buffer needs 1048576" in refusal
    assert left == f"['first'] {7 << 20}"


# --------------------------------------------------------------------------- from one process to another


def parameters_of(version):
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=generator) for name, shape in LLAMA}


@pytest.fixture
def exporter(buffers):
    layout = plan_layout(LLAMA, torch.bfloat16, 2048)
    assert layout.num_buckets > 4
    return WeightExporter(layout, buffers(layout.buffer_bytes))


def test_a_reader_sees_each_bucket_in_the_dtype_of_the_actor(exporter):
    reader = WeightReader(exporter.layout.manifest(RUN), exporter.handle(RUN))
    for version in (1, 2):
        parameters = parameters_of(version)
        for bucket in range(exporter.layout.num_buckets):
            written = exporter.fill(bucket, parameters.__getitem__)
            tensors, read = reader.read(bucket)
            assert read == written
            assert [name for name, _ in tensors] == [p.name for p in exporter.layout.bucket(bucket)]
            for name, tensor in tensors:
                assert torch.equal(tensor, parameters[name].bfloat16()), name


def test_the_bucket_before_stays_as_it_was_while_one_is_filled(exporter):
    reader = WeightReader(exporter.layout.manifest(RUN), exporter.handle(RUN))
    parameters = parameters_of(1)
    for bucket in range(1, exporter.layout.num_buckets):
        exporter.fill(bucket - 1, parameters.__getitem__)
        held, _ = reader.read(bucket - 1)
        exporter.fill(bucket, parameters.__getitem__)
        assert all(torch.equal(tensor, parameters[name].bfloat16()) for name, tensor in held)


def test_a_bucket_that_was_damaged_on_its_way_is_not_loaded(exporter):
    handle = exporter.handle(RUN)
    reader = WeightReader(exporter.layout.manifest(RUN), handle)
    written = exporter.fill(0, parameters_of(1).__getitem__)
    loaded = []
    load_checked(reader, 0, written, loaded.append)
    with (SHM_FOLDER / handle.segment).open("r+b") as segment:
        byte = segment.read(1)
        segment.seek(0)
        segment.write(bytes([byte[0] ^ 1]))
    with pytest.raises(WorkerDied, match="bucket 0 of the weights arrived damaged"):
        load_checked(reader, 0, written, loaded.append)
    assert len(loaded) == 1


def test_the_number_of_mappings_stays_flat(exporter):
    reader = WeightReader(exporter.layout.manifest(RUN), exporter.handle(RUN))

    def num_mappings():
        with open("/proc/self/maps") as maps:
            return sum(f"oatlite-{RUN}-" in line for line in maps)

    before = num_mappings()
    assert before == 2  # the writer's and the reader's
    for version in range(50):
        parameters = parameters_of(version)
        for bucket in range(exporter.layout.num_buckets):
            assert exporter.fill(bucket, parameters.__getitem__) == reader.read(bucket)[1]
    assert num_mappings() == before


READER = """
    import sys
    from pathlib import Path
    from oatlite.messages.codec import decode
    from oatlite.weights import WeightReader

    *manifest, handle = [decode([bytes.fromhex(f) for f in line.split(",")]) for line in sys.stdin.read().split()]
    reader = WeightReader(manifest[0], handle)
    tensors, checksum = reader.read(0)
    print(checksum, float(tensors[0][1].float().sum()), flush=True)
    {}
"""


def read_elsewhere(exporter, and_then):
    """Run a second process that reads bucket 0 by what goes over the wire, and then does more."""
    sent = [exporter.layout.manifest(RUN), exporter.handle(RUN)]
    lines = [",".join(bytes(frame).hex() for frame in encode(message)) for message in sent]
    code = textwrap.dedent(READER).format(and_then)
    return subprocess.run([sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True)


def test_a_second_process_reads_what_the_first_wrote_and_its_death_leaves_the_segment(exporter):
    parameters = parameters_of(3)
    written = exporter.fill(0, parameters.__getitem__)
    done = read_elsewhere(exporter, "import os; os.kill(os.getpid(), 9)")
    assert done.returncode == -signal.SIGKILL, done.stderr
    total = float(parameters["model.embed_tokens.weight"].bfloat16().float().sum())
    assert done.stdout.split() == [written, str(total)]
    assert path_of(exporter._buffer).exists()


def test_a_reader_that_writes_dies_and_changes_nothing(exporter):
    written = exporter.fill(0, parameters_of(3).__getitem__)
    done = read_elsewhere(exporter, "tensors[0][1].zero_(); print('wrote')")
    assert "wrote" not in done.stdout and written in done.stdout
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
    start, end = exporter.layout.span(0)
    assert checksum(exporter._buffer.data[start:end]) == written


def test_a_view_is_of_the_buffer_itself():
    buffer = torch.zeros(1024, dtype=torch.uint8)
    place = Placement(name="a", shape=(2, 3), dtype=torch.float32, bucket=0, offset=256)
    view(buffer, place).fill_(1.0)
    assert buffer[:256].sum() == 0 and buffer[256:280].view(torch.float32).tolist() == [1.0] * 6
    assert buffer[280:].sum() == 0
