"""A checkpoint's processor, with or without torchvision.

``load_processor(source)``   what ``AutoProcessor`` gives; without torchvision, the same class for images only
``images_only(cls)``         a processor class without its video processor

``transformers`` has every image processor on PIL, but video processors and Pixtral's processor on torchvision alone, and
refuses the whole processor where they are missing: Qwen-VL, InternVL, LLaVA-OneVision, SmolVLM, GLM-4V, Mistral 3.
Images need neither.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["images_only", "load_processor", "processor_class"]

_PIXTRAL = "transformers.models.pixtral."


def load_processor(source: str | Path, revision: str | None = None) -> Any:
    """The processor of a checkpoint.

    Parameters
    ----------
    source : directory or Hub id
    revision : str, optional

    Raises
    ------
    OSError, ValueError, ImportError
        What ``transformers`` raises where there is none, or a package is missing.
    """
    from transformers import AutoProcessor

    from vlm_core.subjects.checkpoint import SAFE

    if find_spec("torchvision") is None:
        name = _declared(str(source), revision)
        cls = processor_class(name) if name else None
        if cls is not None and (name == "PixtralProcessor" or "video_processor" in cls.get_attributes()):
            return images_only(cls).from_pretrained(source, revision=revision, **SAFE)
    return AutoProcessor.from_pretrained(source, revision=revision, **SAFE)


def _declared(source: str, revision: str | None) -> str | None:
    # The class that the checkpoint's files name, looked up where AutoProcessor does.
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import cached_file

    from vlm_core.subjects.checkpoint import SAFE

    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = cached_file(
            source,
            file,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        name = json.loads(Path(path).read_text()).get("processor_class") if path else None
        if name:
            return name
    return PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(source, revision=revision, **SAFE).model_type)


def processor_class(name: str) -> Any:
    """The processor class of ``transformers`` with that name, or None."""
    from transformers.models.auto.processing_auto import processor_class_from_name

    if name != "PixtralProcessor" or find_spec("torchvision") is not None:
        return processor_class_from_name(name)
    # Its module takes one function of arithmetic from the image processor on torchvision; the one on PIL has the same.
    with _standing_in(sys.modules, _PIXTRAL + "image_processing_pixtral", import_module(_PIXTRAL + "image_processing_pil_pixtral")):
        return import_module(_PIXTRAL + "processing_pixtral").PixtralProcessor


def images_only(cls: type) -> type:
    """``cls`` without its video processor: the same class otherwise, and saved under the same name."""
    if "video_processor" not in cls.get_attributes():
        return cls
    kept = [name for name in cls.get_attributes() if name != "video_processor"]
    place = list(inspect.signature(cls.__init__).parameters).index("video_processor") - 1

    def from_args_and_dict(made: type, args: list, processor_dict: dict, **kwargs: Any) -> Any:
        module = vars(sys.modules[cls.__module__])
        # SmolVLM asks for a package that writes out numbers, which it does for videos.
        with _standing_in(module, "num2words", module.get("num2words") or str):
            return super(smaller, made).from_args_and_dict([*args[:place], None, *args[place:]], processor_dict, **kwargs)

    smaller = type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "__doc__": cls.__doc__,
            "get_attributes": classmethod(lambda made: kept),
            "from_args_and_dict": classmethod(from_args_and_dict),
            "video_processor": SimpleNamespace(num_frames=None, fps=None),
        },
    )
    return smaller


@contextmanager
def _standing_in(names: dict, name: str, value: Any) -> Iterator[None]:
    known, before = name in names, names.get(name)
    names[name] = value
    try:
        yield
    finally:
        if known:
            names[name] = before
        else:
            del names[name]
