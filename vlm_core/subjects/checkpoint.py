"""A checkpoint on disk or on the Hub, judged without loading its weights.

``precheck_subject(path_or_id)``    raise ``SubjectError`` for what can be known cheaply
``inspect_checkpoint(...)``         the same, giving a ``Checkpoint`` with sizes, dtype, commit and hashes

Nothing that a checkpoint brings is executed: weights are safetensors, model and processor are classes of transformers' own, and what
asks for more (code of its own, a kernel to be downloaded, an adapter that names another base) is refused here in one sentence.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm_core.errors import SubjectError

__all__ = ["Checkpoint", "inspect_checkpoint", "precheck_subject"]

SAFE = {"trust_remote_code": False}
"""What every ``from_pretrained`` is given: a checkpoint's own code is never run, nor asked about."""

_SETTINGS = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json",
    "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
    "added_tokens.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "video_preprocessor_config.json",
)  # fmt: skip
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def _hash_files(files: tuple[Path, ...]) -> str:
    """SHA-256 of files, read once for as long as none was written to."""
    return _read_whole(files, tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=16)
def _read_whole(files: tuple[Path, ...], state: tuple) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(2**22):
                digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """What is known about a checkpoint before its weights are read.

    Parameters
    ----------
    source : str
        Directory or Hub id.
    revision : str or None
        What was asked for: a branch, a tag or a commit of the Hub.
    commit : str or None
        The Hub's commit that it stands for; None for a directory.
    directory : Path or None
        Local files, where there are any.
    n_parameters : int or None
        From the headers of the files, or what the Hub says of them; None where neither is known.
    """

    name: str
    source: str
    revision: str | None
    directory: Path | None
    config: dict[str, Any]
    files: tuple[Path, ...]
    n_parameters: int | None
    commit: str | None = None

    @property
    def dtype(self) -> str:
        """The stored dtype by the config's word, ``"float32"`` where it is silent."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")

    def sha256(self) -> str | None:
        """Hash of the weight files, read whole and once; None where they are not local."""
        if not self.files:
            return None
        return _hash_files(self.files)

    def content(self) -> str | None:
        """Hash of configuration, processor and tokenizer files, read whole: with ``sha256`` all that a local checkpoint is; None without files."""
        if self.directory is None:
            return None
        return _hash_files(tuple(path for name in _SETTINGS if (path := self.directory / name).is_file()))


def precheck_subject(path_or_id: str | Path, revision: str | None = None) -> None:
    """Raise ``SubjectError`` for everything that can be told without loading weights.

    Checks that the checkpoint exists, is a vision-language model of a declared family and that its safetensors files
    are complete (header readable, size as announced, no shard missing).
    """
    inspect_checkpoint(path_or_id, revision)


def inspect_checkpoint(path_or_id: str | Path, revision: str | None = None) -> Checkpoint:
    """Read a checkpoint's config and safetensors headers.

    Raises
    ------
    SubjectError
        One sentence that says what is wrong with it and what to do.
    """
    from vlm_core.families.family import find_family

    if not isinstance(path_or_id, str | Path) or not str(path_or_id).strip():
        raise SubjectError(
            f"a subject is named by a directory or a Hub id, got {path_or_id!r} ({type(path_or_id).__name__}): give the path of a saved "
            f"checkpoint."
        )
    source = str(path_or_id)
    local = Path(source)
    if local.is_file():
        raise SubjectError(f"subject '{source}' is a file: point to the folder of a saved checkpoint, which has a config.json.")
    name, commit, n_parameters = local.name or source, None, None
    if local.is_dir():
        directory: Path | None = local
        config_file = local / "config.json"
        if not config_file.is_file():
            raise SubjectError(
                f"subject '{source}' is a directory without config.json: point to the folder of a saved checkpoint."
            )
    else:
        config_file, commit, n_parameters = _from_hub(source, revision)
        directory = config_file.parent
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not isinstance(config.get("text_config") or {}, dict):
            raise ValueError("it or its text_config is no table of settings")
    except ValueError as error:
        raise SubjectError(f"subject '{source}' has an unreadable config.json ({error}): save it again.") from error
    model_type = str(config.get("model_type", ""))
    if "vision_config" not in config:
        raise SubjectError(
            f"subject '{source}' is a text-only checkpoint (model_type '{model_type}', no vision_config): choose a "
            f"vision-language model."
        )
    find_family(model_type, source, str((config.get("text_config") or {}).get("model_type", "")))
    _require_nothing_to_run(source, directory, config)
    here = local.is_dir() or any(directory.glob("*.safetensors"))
    files, counted = _weight_files(source, directory if here else None, complete=local.is_dir())
    return Checkpoint(name, source, revision, directory, config, files, counted or n_parameters, commit)


def _require_nothing_to_run(source: str, directory: Path, config: dict[str, Any]) -> None:
    """Refuse what transformers would follow out of the checkpoint: to another base model, or to a kernel on the Hub."""
    if (directory / "adapter_config.json").is_file():
        raise SubjectError(
            f"subject '{source}' has an adapter (adapter_config.json), which names another checkpoint as its base: load that base with PEFT, "
            f"merge_and_unload() the adapter into it and save the result with save_pretrained."
        )
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    kernels = [str(part[key]) for part in parts for key in ("attn_implementation", "_attn_implementation") if "/" in str(part.get(key, ""))]
    if kernels:
        raise SubjectError(
            f"subject '{source}' asks in its config.json for the attention kernel '{kernels[0]}' of the Hub, and no code of a checkpoint's "
            f"choice is run: remove 'attn_implementation' from its config.json."
        )


def _from_hub(source: str, revision: str | None) -> tuple[Path, str | None, int | None]:
    """The config file, the commit that it is of, and the number of parameters that the Hub tells, where it was asked."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx

    missing = f"subject '{source}' was not found: it is no local directory and "
    try:
        cached = try_to_load_from_cache(source, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached), _commit(Path(cached)), None
        # Asked first: where the Hub cannot be reached, a download would retry for half a minute.
        known = HfApi().model_info(source, revision=revision, timeout=10)
        config = Path(hf_hub_download(source, "config.json", revision=known.sha))
        return config, known.sha, known.safetensors.total if known.safetensors else None
    except HFValidationError as error:
        raise SubjectError(f"{missing}no valid Hub id; check the path.") from error
    except (OSError, ValueError, httpx.HTTPError) as error:
        at = f" at revision '{revision}'" if revision else ""
        raise SubjectError(
            f"{missing}the Hugging Face Hub gave no config.json for it{at} ({type(error).__name__}); check the path "
            f"or id, and that the Hub can be reached."
        ) from error


def _commit(file: Path) -> str | None:
    """The commit in the path of a cached file, ``.../snapshots/<commit>/<file>``."""
    return file.parent.name if file.parent.parent.name == "snapshots" else None


def _weight_files(source: str, directory: Path | None, complete: bool) -> tuple[tuple[Path, ...], int | None]:
    if directory is None:
        return (), None
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SubjectError(
                f"subject '{source}' is corrupted: {index.name} does not say which file holds which weights; copy or download the "
                f"checkpoint again."
            ) from error
    else:
        wanted = sorted(file.name for file in directory.glob("*.safetensors"))
    if not wanted:
        raise SubjectError(
            f"subject '{source}' has no safetensors weights: save it with save_pretrained (pickled weights are not "
            f"loaded)."
        )
    missing = [file for file in wanted if not (directory / file).is_file()]
    if missing and complete:
        raise SubjectError(
            f"subject '{source}' lacks {len(missing)} of {len(wanted)} weight files (first: {missing[0]}): copy the "
            f"checkpoint again."
        )
    if missing:
        return (), None
    files = tuple(directory / file for file in wanted)
    return files, sum(_count_parameters(source, file) for file in files)


def _count_parameters(source: str, file: Path) -> int:
    def corrupted(what: str) -> SubjectError:
        return SubjectError(
            f"subject '{source}' is corrupted: {file.name} {what}; copy or download the checkpoint again."
        )

    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            raise corrupted(f"has {size} bytes, too few for a safetensors header")
        length = struct.unpack("<Q", head)[0]
        if length > size - 8:
            raise corrupted("announces a header longer than the file")
        try:
            header = json.loads(stream.read(length))
            tensors = [
                (*map(int, entry["data_offsets"]), _BYTES.get(entry["dtype"], 1)) for key, entry in header.items() if key != "__metadata__"
            ]
            expected = 8 + length + max((end for _, end, _ in tensors), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise corrupted("has an unreadable header") from error
    if expected != size:
        raise corrupted(f"has {size} bytes where its header announces {expected}")
    return sum((end - start) // width for start, end, width in tensors)
