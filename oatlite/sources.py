"""Where a name leads: to a file, a folder or the hub; and the rows that lie there.

Nothing here is written to disk, the hub's own cache apart.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oatlite.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
HUB_ANSWER_S = 5.0
SHARD = re.compile(r"-\d+-of-\d+$")
_SPARE_FIELDS = "\0"  # no column has this name
ONE_SPLIT = "train"  # what a single file counts as


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def find_local(source: str, what: str) -> Path | None:
    """The existing file or folder ``source``, or None where it is a hub id.

    Whatever looks like a path and isn't there is a ConfigError at once, without asking the hub. Before a hub id is
    handed back, the hub is asked for a sign of life; see :func:`hub_answers`.
    """
    path = Path(source)
    if path.exists():
        return path
    if source.startswith("~"):  # other readers of the same name, vLLM among them, take it to the letter
        raise ConfigError(f"{what} {source}: ~ is not expanded here", f"type {path.expanduser()}")
    looks_like_path = source.startswith((".", "/")) or path.suffix in READERS
    if looks_like_path or not HUB_ID.fullmatch(source):
        raise ConfigError(f"{what} {source} does not exist", _what_is_near(path))
    hub_answers()
    return None


@functools.cache
def hub_answers() -> bool:
    """Whether the hub answers within seconds, asked once in a process.

    Where it doesn't, this process and its children use the cache alone: the libraries would otherwise retry every
    file of every repository for half a minute. An answer with an error status is an answer.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_ANSWER_S)
    except Exception:  # no name, no route, a proxy: types of whichever HTTP library is underneath
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        return False
    return True


def load_rows(source: str, split: str) -> Dataset:
    """The rows of one split of a file, a folder or a hub dataset.

    ``source`` is a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file (one split, called train), a folder of such
    files (``train.jsonl`` and ``test.jsonl`` are the splits train and test; so is ``train-00000-of-00002.parquet``,
    also inside ``data/``), a folder written by ``save_to_disk``, or a hub id, ``id:configuration`` where the dataset
    has several. Values in a csv file are text. Raises ConfigError for what is not there, naming what is.
    """
    path = find_local(source, "the dataset")
    if path is None:
        return _load_from_hub(source, split)
    if path.is_file():
        if path.suffix not in READERS:
            raise ConfigError(f"{source} is no {', '.join(READERS)} file", "convert it, or rename it")
        _check_split(source, split, [ONE_SPLIT])
        return _read_files([path])
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _load_saved(path, source, split)
    files = sorted(p for folder in (path, path / "data") for p in folder.glob("*") if p.suffix in READERS)
    if not files:
        raise ConfigError(f"there are no rows in the folder {source}", f"put train{next(iter(READERS))} there")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(SHARD.sub("", file.stem), []).append(file)
    _check_split(source, split, list(splits))
    return _read_files(splits[split])


def _check_split(source: str, split: str, there: Sequence[str]) -> None:
    if split not in there:
        names = ", ".join(there)
        raise ConfigError(f"{source} has no split {split}", f"it has {names}: name one of them as the split")


def _load_saved(path: Path, source: str, split: str) -> Dataset:
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # torn or foreign files fail in as many ways as there are formats
        raise ConfigError(f"{source} is no complete saved dataset: {first_line(error)}", "save it again") from error
    if isinstance(saved, Dataset):
        _check_split(source, split, [str(saved.split or ONE_SPLIT)])
        return saved
    _check_split(source, split, list(saved))
    return saved[split]


def _load_from_hub(source: str, split: str) -> Dataset:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        return load_dataset(name, configuration or None, split=split)
    except Exception as error:  # a hub, a network and a builder, each with errors of its own
        message = first_line(error)
        if "Config name is missing" in message:
            raise ConfigError(
                f"{name} has several configurations: {' '.join(str(error).split())[:300]}",
                f"type {name}:<configuration>",
            ) from error
        if "split" in message.lower():
            raise ConfigError(f"{source} has no split {split}: {message}", "name one of them as the split") from error
        if not hub_answers():
            raise ConfigError(
                f"{source} is no file or folder here, and as a hub id not in the cache, and the hub does not answer",
                "give a .jsonl file, or download the dataset where there is a network",
            ) from error
        raise ConfigError(
            f"the dataset {source} cannot be loaded: {message}", "check the id, and huggingface-cli login"
        ) from error


def _read_files(files: Sequence[Path]) -> Dataset:
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            rows += READERS[file.suffix](file)
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8 text", "convert it to UTF-8") from error
    if not rows:
        raise ConfigError(f"{', '.join(map(str, files))}: no rows", "give a file with rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except Exception as error:  # Arrow's, for a column that holds several types
        raise ConfigError(
            f"{files[0]}: the rows don't agree: {first_line(error)}", "give each column one type"
        ) from error


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_parse_row(line, f"{file} line {number}"))
    return rows


def _parse_row(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}", "write one JSON object per line") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is a {type(row).__name__}, not an object", 'write {"column": value, ...}')
    return row


def _read_json(file: Path) -> list[dict[str, Any]]:
    """A list of objects; an object that holds one such list (``{"data": [...]}``); or JSON lines after all."""
    text = file.read_text(encoding="utf-8")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return _read_jsonl(file)
    if isinstance(value, dict) and len(value) == 1 and isinstance(inner := next(iter(value.values())), list):
        value = inner
    rows = value if isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{file} is no list of objects", 'write [{"column": value, ...}, ...]')
    return rows


def _read_csv(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            reader = csv.DictReader(lines, strict=True, restkey=_SPARE_FIELDS)
            rows = list(reader)
        except csv.Error as error:
            raise ConfigError(f"{file} is no valid csv: {error}", "quote fields with commas or line ends") from error
    if uneven := next((n for n, row in enumerate(rows, start=1) if _SPARE_FIELDS in row or None in row.values()), None):
        raise ConfigError(
            f"{file}: row {uneven} does not have as many fields as the header", "quote fields with commas"
        )
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{file} is no valid parquet: {first_line(error)}") from error
    return rows


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _what_is_near(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(p.name for p in folder.iterdir() if p.suffix in READERS or p.is_dir()) if folder.is_dir() else []
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{folder.resolve()} has {shown}" if names else f"{folder.resolve()} has no data files or folders"
