"""Rows of a benchmark, one at a time: from the Hub, or from files that lie here. Only where they come from differs.

``stream(benchmark, part, split, source)``   an iterable data set whose pictures are as they are stored, not decoded
``folder_of(source)``                        where pictures may lie that local data names
``missing(benchmark, why)``                  the sentence that says how a benchmark is had
``files_of(source)``                         every file that local data may come from
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
from datasets.exceptions import DatasetNotFoundError

from .declaration import Benchmark

__all__ = ["files_of", "folder_of", "missing", "stream"]

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SPLIT = re.compile(r"^(train|val|validation|dev|test|testdev|challenge|submission)[a-z0-9_]*([-.]|$)")


def stream(
    benchmark: Benchmark, config: str | None, split: str, source: Path | None, columns: Sequence[str] | None = None
) -> datasets.IterableDataset:
    """Rows of one configuration and split.

    Parameters
    ----------
    source : path, optional
        A file, or a folder as the Hub has it; default: the Hub.
    columns : sequence of str, optional
        Read these alone. Of Parquet nothing else is fetched.

    Raises
    ------
    ValueError
        One sentence: not to be had, no such files.
    """
    rows = _hub(benchmark, config, split, columns) if source is None else _local(benchmark, config, split, source, columns)
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows


def folder_of(source: Path | None) -> Path | None:
    """Where pictures may lie that the data names by paths: with it. What comes from the Hub has its pictures in it."""
    return None if source is None else source if source.is_dir() else source.parent


def missing(benchmark: Benchmark, why: str) -> ValueError:
    """How a benchmark is had that is not here."""
    if not benchmark.ids:
        return ValueError(f"the benchmark '{benchmark.name}' is not here: {why}; {benchmark.get}")
    first, *older = benchmark.ids
    return ValueError(
        f"the benchmark '{benchmark.name}' is not here: {why}; it is {first} on the Hugging Face Hub"
        f"{''.join(f' (before: {one})' for one in older)}: go online once, or fetch it elsewhere (hf download --repo-type dataset {first}) "
        f"and name its folder, source=..."
    )


def _hub(benchmark: Benchmark, config: str | None, split: str, columns: Sequence[str] | None) -> datasets.IterableDataset:
    if not benchmark.ids:
        raise missing(benchmark, "it is not on the Hub")
    for one in benchmark.ids:
        try:
            return _loaded(one, columns, name=config, split=split)
        except DatasetNotFoundError:
            continue  # It has moved, or not yet: the next id.
        except RuntimeError as error:
            if "scripts" not in str(error):
                raise
            continue  # It is a script, which is not run.
        except ConnectionError as error:
            raise missing(benchmark, f"the Hub cannot be reached ({_short(error)})") from error
        except ValueError as error:
            raise ValueError(f"'{one}' has no split '{split}'{f' of {config}' if config else ''} ({_short(error)})") from error
    raise missing(benchmark, f"the Hub has none of {', '.join(benchmark.ids)} as data, or wants a login for it")


def _loaded(path: str, columns: Sequence[str] | None, **options) -> datasets.IterableDataset:
    if columns is None:
        return datasets.load_dataset(path, streaming=True, **options)
    builder = datasets.load_dataset_builder(path, **{name: value for name, value in options.items() if name != "split"})
    if type(builder).__module__.endswith(".parquet"):
        return datasets.load_dataset(path, streaming=True, columns=list(columns), **options)
    return datasets.load_dataset(path, streaming=True, **options).select_columns(list(columns))


def _local(
    benchmark: Benchmark, config: str | None, split: str, source: Path, columns: Sequence[str] | None
) -> datasets.IterableDataset:
    if not source.exists():
        raise missing(benchmark, f"there is nothing at {source}")
    if (source / "state.json").is_file():
        kept = datasets.load_from_disk(str(source)).to_iterable_dataset()
        return kept if columns is None else kept.select_columns(list(columns))
    if source.is_file():
        files = [source]
    else:
        root = source / config if config and (source / config).is_dir() else source
        files = _of_split(_data(root), split, root)
        if not files:
            return _pictures(benchmark, root, columns)
    kinds = {READERS.get(file.suffix) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise ValueError(f"{source} is no set that is read here: it takes files of one kind, {', '.join(READERS)}, or a folder of pictures")
    return _loaded(kinds.pop(), columns, data_files=[str(file) for file in files], split="train")


def _data(root: Path) -> list[Path]:
    return sorted(file for file in root.rglob("*") if file.suffix in READERS and file.is_file() and not file.name.startswith("."))


def _of_split(files: Sequence[Path], split: str, root: Path) -> list[Path]:
    """Files that bear the split's name, or lie in a folder that does; all of them where none bears that of any."""
    if any(file.stem == "metadata" for file in files):
        return []

    def bears(file: Path, split: str) -> bool:
        return file.name.startswith((f"{split}-", f"{split}.")) or split in file.relative_to(root).parts[:-1]

    mine = [file for file in files if bears(file, split)]
    others = [file.name for file in files if _SPLIT.match(file.name)]
    if not mine and others:
        raise ValueError(f"{root} has no file of the split '{split}': it has {', '.join(others[:5])}")
    return mine or list(files)


def _pictures(benchmark: Benchmark, root: Path, columns: Sequence[str] | None) -> datasets.IterableDataset:
    if not any(file.suffix.lower() in PICTURES for file in root.rglob("*")):
        raise missing(benchmark, f"{root} holds neither {', '.join(READERS)} nor pictures")
    return _loaded("imagefolder", columns, data_dir=str(root), split="train")


def files_of(source: Path) -> Iterable[Path]:
    """Every file that local data may come from."""
    return [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.is_file())


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
