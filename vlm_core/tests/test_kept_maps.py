"""No observer keeps a map of ``head x query x key`` beyond its layer, but the one that is asked for the whole of it.

A census of everything that torch allocates: what was made in one decoder layer and is still held when the next one begins. A map is
``H·S²`` numbers and grows with the square of the prompt; what reduces it in the layer holds next to nothing, and what a backward
pass needs grows with the prompt's length.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm_core import AttentionMass, FullAttention, observe
from vlm_core.observation.recording_config import KINDS
from vlm_core.tests.tiny import make_items, tiny_subject

LAYERS, HEADS, SIZES = 6, 8, (40, 80)


class Census(TorchDispatchMode):
    """Counts the bytes that torch makes and holds: ``held`` are those alive whenever a decoder layer begins."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.held: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return made

    def count(self, *_) -> None:
        """Count what is alive."""
        self.alive = {key: (weak, size) for key, (weak, size) in self.alive.items() if not weak.expired()}
        self.held.append(sum(size for _, size in self.alive.values()))


class KeepsBlocks:
    """What must not be: an observer that keeps the attention that it was shown, block by block."""

    def __init__(self) -> None:
        self.kept = []

    def attention(self, view):
        self.kept += [block.probabilities for block in view.blocks("all")]
        return AttentionMass().attention(view)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def subjects(request):
    """The same model for a smaller and a larger image: 101 and 401 image tokens."""
    widths = {"layers": LAYERS, "heads": HEADS, "kv_heads": HEADS, "hidden": 64}
    return {size: tiny_subject(attention=request.param, image_size=size, **widths) for size in SIZES}


def held_per_layer(subject, size: int, observer) -> tuple[float, int]:
    """Bytes that observing adds from one layer to the next (median over layers, the largest pass), and those of one layer's map."""
    census, (item,) = Census(), make_items(1, size=size)
    n_tokens = subject.encode_items([item]).image.shape[1]
    handles = [layer.register_forward_pre_hook(census.count) for layer in (*subject.anatomy.layers, subject.anatomy.norm)]
    try:
        with census:
            observe(subject, [item], observer, groups=lambda item, encoded: {"object": every_third(encoded.image.numpy())})
    finally:
        for handle in handles:
            handle.remove()
    passes, rest = divmod(len(census.held), LAYERS + 1)
    assert passes and not rest
    return max(float(np.median(np.diff(one))) for one in np.split(np.array(census.held), passes)), 4 * HEADS * n_tokens**2


def every_third(image: np.ndarray) -> np.ndarray:
    return image & (image.cumsum() % 3 == 0)


BACKWARD = ("head_gradients", "image_gradients", "integrated_gradients")
FORWARD = [name for name, kind in KINDS.items() if name not in BACKWARD and kind is not FullAttention]


@pytest.mark.parametrize("name", FORWARD)
def test_no_map_outlives_its_layer(subjects, name):
    for size, subject in subjects.items():
        held, whole_map = held_per_layer(subject, size, KINDS[name]())
        assert held < 0.1 * whole_map, f"{name} holds {held:.0f} bytes a layer, a map is {whole_map}"


@pytest.mark.parametrize("observer", [FullAttention, KeepsBlocks])
def test_the_census_sees_a_map_that_is_kept(subjects, observer):
    for size, subject in subjects.items():
        held, whole_map = held_per_layer(subject, size, observer())
        assert held > 0.5 * whole_map


@pytest.mark.parametrize("subjects", ["sdpa"], indirect=True)
@pytest.mark.parametrize("name", BACKWARD)
def test_what_a_backward_pass_needs_grows_with_the_prompt(subjects, name):
    """Under sdpa; the model's own eager attention keeps its maps for every backward pass, whoever asks for it."""
    (small, one), (large, other) = (held_per_layer(subjects[size], size, KINDS[name]()) for size in SIZES)
    assert large < 1.1 * small * (other / one) ** 0.5
