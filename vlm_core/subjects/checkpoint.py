"""A checkpoint on disk or on the Hub, judged without loading its weights.

``precheck_subject(path_or_id)``    raise ``SubjectError`` for what can be known cheaply
``inspect_checkpoint(...)``         the same, giving a ``Checkpoint`` with sizes, dtype and hash
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
from vlm_core.memory import free_memory

__all__ = ["Checkpoint", "inspect_checkpoint", "precheck_subject"]

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@lru_cache(maxsize=16)
def _hash_files(files: tuple[Path, ...]) -> str:
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
    directory : Path or None
        Local files, where there are any.
    n_parameters : int or None
    """

    name: str
    source: str
    revision: str | None
    directory: Path | None
    config: dict[str, Any]
    files: tuple[Path, ...]
    n_parameters: int | None

    @property
    def dtype(self) -> str:
        """The stored dtype by the config's word, ``"float32"`` where it is silent."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")

    def sha256(self) -> str | None:
        """Hash of the weight files, read whole and once; None where they are not local."""
        if not self.files:
            return None
        return _hash_files(self.files)

    def require_memory(self, device: str, dtype: Any) -> None:
        """Raise ``SubjectError`` if the weights do not fit the free memory of ``device``."""
        import torch

        if self.n_parameters is None:
            return
        needed = int(self.n_parameters * torch.empty((), dtype=dtype).element_size() * 1.2)
        if str(device).startswith("cuda"):
            free = torch.cuda.mem_get_info(torch.device(device))[0]
        else:
            free = free_memory()
        if needed > free:
            raise SubjectError(
                f"subject '{self.name}' needs about {needed / 2**30:.1f} GiB on {device} "
                f"({self.n_parameters / 1e9:.2f} G parameters as {str(dtype).removeprefix('torch.')}), but only "
                f"{free / 2**30:.1f} GiB are free: use a smaller checkpoint, a smaller dtype or another device."
            )


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
    name = local.name or source
    if local.is_dir():
        directory: Path | None = local
        config_file = local / "config.json"
        if not config_file.is_file():
            raise SubjectError(
                f"subject '{source}' is a directory without config.json: point to the folder of a saved checkpoint."
            )
    else:
        config_file, directory = _from_hub(source, revision), None
        snapshot = config_file.parent
        if any(snapshot.glob("*.safetensors")):
            directory = snapshot
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
    files, n_parameters = _weight_files(source, directory, complete=local.is_dir())
    return Checkpoint(name, source, revision, directory, config, files, n_parameters)


def _from_hub(source: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx

    missing = f"subject '{source}' was not found: it is no local directory and "
    try:
        cached = try_to_load_from_cache(source, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        # Asked first: where the Hub cannot be reached, a download would retry for half a minute.
        HfApi().model_info(source, revision=revision, timeout=10)
        return Path(hf_hub_download(source, "config.json", revision=revision))
    except HFValidationError as error:
        raise SubjectError(f"{missing}no valid Hub id; check the path.") from error
    except (OSError, ValueError, httpx.HTTPError) as error:
        at = f" at revision '{revision}'" if revision else ""
        raise SubjectError(
            f"{missing}the Hugging Face Hub gave no config.json for it{at} ({type(error).__name__}); check the path "
            f"or id, and that the Hub can be reached."
        ) from error


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
