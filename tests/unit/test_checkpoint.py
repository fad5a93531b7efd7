"""A save that is killed at each of its stages, and what is told of checkpoints that cannot be read."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from oatlite.checkpoint import MANIFEST, CheckpointWriter, complete, name_of, prune, read, steps_of, unfinished
from oatlite.errors import CheckpointError, StorageError
from oatlite.resuming import choose, how_to_go_on

# Saves step 1 and then step 2, which replaces it; and dies before the n-th thing that it does to the file system from
# there on. Each n has a process of its own, forked so that Python starts once.
DYING_SAVES = """
    import os, signal, sys
    from pathlib import Path
    from oatlite.checkpoint import CheckpointWriter, prune

    WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

    def save(root, step):
        writer = CheckpointWriter(root, step)
        writer.begin()
        for name in ("optimizer/states.pt", "pairs-0.safetensors"):
            with writer.open(name) as file:
                for part in range(3):
                    stage("write")
                    file.write(bytes([step]) * 100_000)
        writer.complete(step, writer.records, {"step": step})
        prune(root, 1)

    left = None

    def stage(event, *arguments):
        global left
        if left is not None:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda event, arguments: event in WRITES and stage(event))
    fsync = os.fsync
    os.fsync = lambda descriptor: (stage("fsync"), fsync(descriptor))
    for number in range(1000):
        root = Path(sys.argv[1]) / f"{number:03d}"
        child = os.fork()
        if not child:
            save(root, 1)
            left = number
            save(root, int(sys.argv[2]))
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
"""


@pytest.mark.fault("10")
@pytest.mark.parametrize("second", [2, 1], ids=["the next step", "the same step again"])
def test_a_save_that_is_killed_at_any_stage_leaves_a_complete_checkpoint(second: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(DYING_SAVES), str(tmp_path), str(second)]
    subprocess.run(command, check=True, timeout=600)
    roots = sorted(tmp_path.iterdir())
    assert len(roots) > 25, "stages of a save"
    newest = []
    for root in roots:
        found = complete(root)
        if second == 2:
            assert found, root
        for checkpoint in found:
            checkpoint.verify()
        newest.append(found[0].step if found else 0)
        known = {path.name for path in unfinished(root)} | {one.folder.name for one in found}
        assert {path.name for path in root.iterdir()} == known
        prune(root, 1)
        assert [path.name for path in root.iterdir()] == ([name_of(found[0].step)] if found else [])
    assert newest[0] == 1 and newest[-1] == second
    if second == 2:
        assert newest == sorted(newest), "from one stage on the new one counts"


def save(root: Path, step: int) -> Path:
    writer = CheckpointWriter(root, step)
    writer.begin()
    with writer.open("data") as file:
        file.write(b"x" * 1000)
    writer.complete(step, writer.records, {})
    return root / name_of(step)


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_manifest_that_cannot_be_read_is_named_and_an_older_checkpoint_is_taken_when_asked_for(
    damage: str, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        manifest = save(root, step) / MANIFEST
    data = bytearray(manifest.read_bytes())
    data[data.index(b"format")] ^= 1
    match damage:
        case "cut":
            manifest.write_bytes(data[:-10])
        case "flip":
            manifest.write_bytes(data)
        case "remove":
            manifest.unlink()
    with pytest.raises(CheckpointError, match="add --from-step 2, the checkpoint before it") as caught:
        choose(root, None)
    assert str(manifest) in str(caught.value)
    choose(root, 2).verify()
    assert "oatlite resume" in how_to_go_on(tmp_path)
    prune(root, 3, newer_than=2)
    assert steps_of(root) == [2, 1]


@pytest.mark.fault("11")
def test_no_bit_of_a_manifest_can_be_turned_without_being_noticed(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 12)
    writer.begin()
    about = {"progress": {"step": 12, "num_queries": 96}, "config": {"learner": {"lr": 1e-5, "betas": [0.9, 0.95]}}}
    writer.complete(12, writer.records, about)
    manifest = tmp_path / name_of(12) / MANIFEST
    written = manifest.read_bytes()
    assert read(manifest.parent).about == about
    spaces = {i for i, byte in enumerate(written) if byte in b" \n"}
    for place in set(range(len(written))) - spaces:
        for bit in range(8):
            turned = bytearray(written)
            turned[place] ^= 1 << bit
            if turned.replace(b"E", b"e") == written:  # of a number's exponent, which is the same number
                continue
            manifest.write_bytes(turned)
            with pytest.raises(CheckpointError):
                read(manifest.parent)
    manifest.write_bytes(written)
    manifest.parent.rename(tmp_path / name_of(13))
    with pytest.raises(CheckpointError):
        read(tmp_path / name_of(13))


def test_what_a_library_wrote_becomes_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "theirs" / "part").mkdir(parents=True)
    for name in ("one", "part/two"):
        (tmp_path / "theirs" / name).write_text(name)
    writer = CheckpointWriter(tmp_path, 3)
    writer.adopt(tmp_path / "theirs")
    assert steps_of(tmp_path) == []
    writer.complete(3, writer.records, {})
    assert [path.name for path in tmp_path.iterdir()] == [name_of(3)]
    checkpoint = read(tmp_path / name_of(3))
    assert [record.name for record in checkpoint.files] == ["one", "part/two"]
    checkpoint.verify()
    (checkpoint.folder / "part" / "two").write_text("part/tow")
    with pytest.raises(CheckpointError, match="part/two is not what was written"):
        checkpoint.verify()


def test_a_run_without_a_checkpoint_is_started_again(tmp_path: Path) -> None:
    assert how_to_go_on(tmp_path).endswith(f"oatlite train --config {tmp_path / 'config.toml'}")


def on_a_disk_of(size: str, folder: Path, script: str) -> str:
    """What ``script`` prints with ``folder`` as its argument: a real tmpfs, in a mount namespace of its own."""
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    try:
        subprocess.run([*unshare, f"mount -t tmpfs none {folder}"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine allows no tmpfs of our own")
    command = f'mount -t tmpfs -o size={size} none {folder} && exec {sys.executable} -c "$0" {folder}'
    done = subprocess.run([*unshare, command, textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


FULL_DISK = """
    import json, sys
    from pathlib import Path
    import torch
    from oatlite.checkpoint import CheckpointWriter, complete
    from oatlite.errors import StorageError

    def save(step, size):
        writer = CheckpointWriter(Path(sys.argv[1]), step)
        writer.begin()
        with writer.open("states.pt") as file:
            torch.save(torch.zeros(size, dtype=torch.uint8), file)
        writer.complete(step, writer.records, {})

    told = []
    for step, size in ((1, 4 << 20), (1, 2 << 20), (2, 2 << 20)):
        try:
            save(step, size)
        except StorageError as error:
            told.append(str(error))
    (before,) = complete(Path(sys.argv[1]))
    before.verify()
    print(json.dumps({"told": told, "step": before.step}))
"""


@pytest.mark.fault("9")
def test_a_full_disk_keeps_the_checkpoint_before_and_says_what_is_needed_and_free(tmp_path: Path) -> None:
    printed = on_a_disk_of("3m", tmp_path, FULL_DISK)
    found = json.loads(printed)
    first, second = found["told"]
    assert found["step"] == 1
    assert "No space left on device; a checkpoint takes more than" in first
    needed, free = (int(word) for word in second.split("checkpoint takes ")[1].split() if word.isdigit())
    assert 2 << 20 < needed < (2 << 20) + 10_000
    assert free <= (1 << 20)
    assert "checkpoint.keep_last=1" in second


FULL_FOR_A_MODEL = """
    import sys
    from pathlib import Path
    import torch
    from oatlite.errors import StorageError
    from oatlite.output_folder import complete_or_absent
    from safetensors.torch import save_file

    try:
        with complete_or_absent(Path(sys.argv[1]) / "model") as folder:
            save_file({"weight": torch.zeros(1 << 20)}, folder / "model.safetensors")
    except StorageError as error:
        print(error, list(Path(sys.argv[1]).iterdir()))
"""


@pytest.mark.fault("9")
def test_a_disk_that_is_too_full_for_the_model_is_told_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    printed = on_a_disk_of("1m", tmp_path, FULL_FOR_A_MODEL)
    words = rf"cannot write {tmp_path}/model: No space left on device; it takes more than \d+ bytes and (\d+) are free"
    found = re.fullmatch(rf"{words}; free space on that disk \[\]\n", printed)
    assert found and 1 << 19 < int(found[1]) <= 1 << 20, printed


def test_an_error_that_is_not_the_disks_comes_out_as_it_is(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 1)
    writer.begin()
    with pytest.raises(RuntimeError, match="of another kind"), writer.open("data"):
        raise RuntimeError("of another kind")
    os.rename(writer.folder, tmp_path / "elsewhere")
    (tmp_path / writer.folder.name).write_text("a file in its place")
    with pytest.raises(StorageError, match="Not a directory"), writer.open("folder/more"):
        pass
