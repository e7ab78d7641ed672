"""Adapters on chosen layers of the language model only.

``lora_targets(...)``    the one regular expression that names their modules for PEFT
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions.numeric import integers

__all__ = ["lora_targets"]


def lora_targets(anatomy: Anatomy, layers: Sequence[int], modules: Sequence[str] = ("q_proj", "k_proj", "v_proj")) -> str:
    """``LoraConfig(target_modules=...)`` for attention modules of some decoder layers.

    Names with ``layers_to_transform`` would also match the vision tower, whose layers are numbered alike and whose modules have the
    same names; PEFT matches a string against whole module paths.

    Parameters
    ----------
    layers : sequence of int
    modules : sequence of str
        Names inside the attention module.

    Raises
    ------
    ValueError
        For a layer or a module that the model does not have.
    """
    if not isinstance(anatomy, Anatomy):
        raise TypeError(f"lora_targets needs a subject's anatomy, got {type(anatomy).__name__}: pass subject.anatomy")
    layers = integers(layers, "layers", "each of layers")
    if isinstance(modules, str) or not layers or not modules:
        raise ValueError(f"lora_targets needs lists of at least one layer and one module, got {layers} and {modules!r}")
    family = anatomy.family
    for layer in layers:
        if not 0 <= layer < anatomy.n_layers:
            raise ValueError(f"layer {layer} lies outside this model's {anatomy.n_layers} layers")
        for module in modules:
            if not hasattr(anatomy.attentions[layer], module):
                raise ValueError(f"the attention of layer {layer} ({type(anatomy.attentions[layer]).__name__}) has no module '{module}'")
    names = sorted({family.cross_attention if layer in anatomy.cross_layers else family.attention for layer in layers})
    path = re.escape(f"{family.language_model}.{family.layers}")
    one_of = [f"({'|'.join(map(str, options))})" for options in (sorted(set(layers)), names, modules)]
    return rf"{path}\.{one_of[0]}\.{one_of[1]}\.{one_of[2]}"
