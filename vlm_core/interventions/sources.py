"""Tensors that interventions refer to: means, another image's keys and values, captured activations, noise.

``HeadMeans``, ``ImageKVMeans``   one vector per head
``HeadDirections``                one direction per head
``ImageKV``                       the image keys and values of one prompt, token by token
``Activations``                   what one prompt had at some sites (``vlm_core.subjects.activations`` captures them)
``Vector``                        one direction, or one mean token
``Couplings``                     how much questions couple to the image tokens of some items
``GateWeights``                   a trained scorer of image tokens
``GaussianNoise``                 noise that depends on its seed, the item, the site, the layer and the token, and on nothing else

Each is frozen and compares by the ``digest`` of its content, which is the same in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from vlm_core.interventions.numeric import integer, real, require_finite

__all__ = [
    "SITES",
    "Activations",
    "Couplings",
    "GateWeights",
    "GaussianNoise",
    "HeadDirections",
    "HeadMeans",
    "ImageKV",
    "ImageKVMeans",
    "Source",
    "Vector",
]

SITES = ("residual", "attention", "mlp", "head")
"""Where activations are captured and patched.

``residual`` is the stream that *enters* a layer (index ``n_layers``: the final norm), ``attention`` and ``mlp`` are what
these modules add to it, ``head`` the outputs of single heads before the output projection.
"""

_MEANS = ("layer", "head", "head_dim")


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        # In float64 every narrower number is itself; the shape tells a tensor from another of the same numbers.
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.float64).contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _check_pair(kind: str, keys: torch.Tensor, values: torch.Tensor, shape: tuple[str, ...]) -> None:
    require_finite(keys, f"keys of {kind}", shape)
    require_finite(values, f"values of {kind}", shape)
    if keys.shape != values.shape:
        raise ValueError(
            f"keys and values of {kind} must have one shape [{', '.join(shape)}], got {tuple(keys.shape)} and {tuple(values.shape)}: "
            f"take both from the same subject"
        )


class Source:
    """Equality and hash by content, across processes."""

    digest: str

    def to_dict(self) -> dict:
        """Kind and digest; ``vlm_core.interventions.stored`` keeps the tensors."""
        return {"kind": type(self).__name__, "digest": self.digest}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.digest})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.digest == self.digest

    def __hash__(self) -> int:
        return int(hashlib.sha256(f"{type(self).__name__} {self.digest}".encode()).hexdigest()[:15], 16)


@dataclass(frozen=True, eq=False, repr=False)
class HeadMeans(Source):
    """Mean output of every head: ``values`` ``[layer, head, head_dim]``."""

    values: torch.Tensor
    count: int = 0
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        require_finite(self.values, "values of HeadMeans", _MEANS)
        object.__setattr__(self, "digest", _digest(self.values))


@dataclass(frozen=True, eq=False, repr=False)
class HeadDirections(Source):
    """One direction for every head: ``values`` ``[layer, head, head_dim]``, of any length but zero; kept in float32 at length 1."""

    values: torch.Tensor
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        require_finite(self.values, "values of HeadDirections", _MEANS)
        lengths = self.values.double().norm(dim=-1, keepdim=True)
        if bool((lengths == 0).any()):
            layer, head = (lengths[..., 0] == 0).nonzero()[0].tolist()
            raise ValueError(f"the direction of head {layer}.{head} is zero: a direction needs a length")
        # Only what is not at length 1 is scaled, so that stored directions are the same again.
        unit = torch.where((lengths - 1).abs() > 1e-6, self.values.double() / lengths, self.values.double()).float()
        object.__setattr__(self, "values", unit)
        object.__setattr__(self, "digest", _digest(self.values))

    @classmethod
    def random(cls, n_layers: int, n_heads: int, head_dim: int, seed: int = 0) -> HeadDirections:
        """Directions drawn evenly from the sphere."""
        seed = integer(seed, "seed of HeadDirections", least=0)
        return cls(torch.from_numpy(np.random.default_rng(seed).standard_normal((n_layers, n_heads, head_dim)).astype(np.float32)))


@dataclass(frozen=True, eq=False, repr=False)
class ImageKVMeans(Source):
    """Mean image key and value of every query head: ``keys``, ``values`` ``[layer, head, head_dim]``.

    Keys are taken as the seam sees them, after rotary embedding, and averaged over image positions and items. The mean
    of rotated keys is not the rotation of a mean key: high-frequency components average towards zero. It is the same
    constant at every image position, which is what makes the replaced tokens indistinguishable.
    """

    keys: torch.Tensor
    values: torch.Tensor
    count: int = 0
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        _check_pair("ImageKVMeans", self.keys, self.values, _MEANS)
        object.__setattr__(self, "digest", _digest(self.keys, self.values))


@dataclass(frozen=True, eq=False, repr=False)
class ImageKV(Source):
    """Image keys and values of one prompt: ``keys``, ``values`` ``[layer, head, image token, head_dim]``.

    Keys are as the seam sees them, after rotary embedding: they belong to the positions at which they were captured,
    so the other image's tokens must lie at the same positions (the same prompt does).
    """

    keys: torch.Tensor
    values: torch.Tensor
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        _check_pair("ImageKV", self.keys, self.values, ("layer", "head", "image token", "head_dim"))
        object.__setattr__(self, "digest", _digest(self.keys, self.values))


@dataclass(frozen=True, eq=False, repr=False)
class Vector(Source):
    """One vector of the residual stream: ``values`` ``[hidden]``."""

    values: torch.Tensor
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.values, torch.Tensor) and self.values.ndim != 1:
            raise ValueError(f"a direction is one vector [hidden], got a tensor of shape {tuple(self.values.shape)}")
        require_finite(self.values, "values of Vector")
        object.__setattr__(self, "digest", _digest(self.values))


@dataclass(frozen=True, eq=False, repr=False)
class Couplings(Source):
    """How much a question couples to each image token of some items: 0 or more, in any unit.

    Parameters
    ----------
    items : LongTensor ``[item]``
        Numbers of the items (``vlm_core.items.item_number``), each once.
    counts : LongTensor ``[item]``
        Image tokens of each.
    values : Tensor ``[image token]``
        Of all items one after the other.
    """

    items: torch.Tensor
    counts: torch.Tensor
    values: torch.Tensor
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        require_finite(self.values, "values of Couplings", ("image token",))
        for name in ("items", "counts"):
            require_finite(getattr(self, name), f"{name} of Couplings", ("item",))
        if len(self.items) != len(self.counts) or int(self.counts.sum()) != len(self.values) or bool((self.counts < 0).any()):
            raise ValueError(f"Couplings of {len(self.items)} items count {self.counts.tolist()[:8]} tokens for {len(self.values)} values")
        if len(set(self.items.tolist())) != len(self.items):
            raise ValueError("Couplings hold each item once: two of them have one number")
        if bool((self.values < 0).any()):
            raise ValueError(f"values of Couplings must be 0 or more, got {float(self.values.min()):g}")
        object.__setattr__(self, "digest", _digest(self.items, self.counts, self.values))

    def of(self, item: int) -> torch.Tensor:
        """Those of one item, ``[image token]``; a ``ValueError`` where it is not among them."""
        place = (self.items == item).nonzero()
        if not len(place):
            raise ValueError(
                f"couplings of {len(self.items)} items are held, not those of item number {item}: make them of the items measured"
            )
        start = int(self.counts[: int(place[0, 0])].sum())
        return self.values[start : start + int(self.counts[int(place[0, 0])])]


_GATE = {"token": 2, "question": 2, "bias": 1, "out": 1, "direct": 1, "subject": 2}


@dataclass(frozen=True, eq=False, repr=False)
class GateWeights(Source):
    """Weights of a scorer of image tokens (``vlm_core.reduction.gate`` says how it reads them).

    Parameters
    ----------
    token, question : Tensor ``[width, hidden]``
    bias, out : Tensor ``[width]``
    direct : Tensor ``[hidden]``
    subject : Tensor ``[token, hidden]``
        What tells the subject that it was trained on (``vlm_core.reduction.gate.marks``); no rows where it was trained on none.
    """

    token: torch.Tensor
    question: torch.Tensor
    bias: torch.Tensor
    out: torch.Tensor
    direct: torch.Tensor
    subject: torch.Tensor
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        for name, axes in _GATE.items():
            require_finite(getattr(self, name), f"{name} of GateWeights", ("width", "hidden")[-axes:])
        width, hidden = self.token.shape
        expected = {"question": (width, hidden), "bias": (width,), "out": (width,), "direct": (hidden,)}
        found = {name: tuple(getattr(self, name).shape) for name in expected}
        if found != expected or self.subject.shape[1] != hidden:
            raise ValueError(f"weights of a gate on {hidden} numbers of width {width} must have shapes {expected}, got {found}")
        object.__setattr__(self, "digest", _digest(*(getattr(self, name) for name in _GATE)))

    @property
    def hidden_size(self) -> int:
        """Numbers of the residual stream that it reads."""
        return self.token.shape[1]


@dataclass(frozen=True, eq=False, repr=False)
class Activations(Source):
    """What one prompt had at some sites and layers.

    Parameters
    ----------
    values : mapping of (site, layer) to Tensor
        ``[token, hidden]``; ``[token, head, head_dim]`` at the site ``head``. No padding.
    image : BoolTensor ``[token]``
        Which tokens are image tokens.
    groups : mapping of str to BoolTensor ``[token]``
        Named groups of the prompt.
    """

    values: Mapping[tuple[str, int], torch.Tensor]
    image: torch.Tensor
    groups: Mapping[str, torch.Tensor] = field(default_factory=dict)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        groups = self.groups if isinstance(self.groups, Mapping) else {"": None}
        if not isinstance(self.values, Mapping) or not all(isinstance(key, tuple) and len(key) == 2 for key in self.values):
            raise ValueError("values of Activations must be a mapping of (site, layer) to tensors: capture_activations gives them")
        if not all(isinstance(one, torch.Tensor) for one in (self.image, *self.values.values(), *groups.values())):
            raise ValueError("image, values and groups of Activations must be tensors, the latter two by name: capture_activations gives them")
        for (site, layer), tensor in self.values.items():
            if site not in SITES:
                raise ValueError(f"'{site}' is not a site: choose from {', '.join(SITES)}")
            if tensor.shape[0] != self.image.shape[0]:
                raise ValueError(
                    f"activations of site '{site}' at layer {layer} have {tensor.shape[0]} tokens, the prompt has "
                    f"{self.image.shape[0]}"
                )
            require_finite(tensor, f"activations of site '{site}' at layer {layer}")
        names, groups = sorted(self.values), sorted(self.groups)
        tensors = [self.values[name] for name in names] + [self.groups[name] for name in groups]
        digest = hashlib.sha256(repr((names, groups)).encode())
        digest.update(_digest(self.image, *tensors).encode())
        object.__setattr__(self, "digest", digest.hexdigest()[:12])

    def at(self, site: str, layer: int) -> torch.Tensor:
        """The activations of one site and layer; a ``ValueError`` naming what was captured if it is not among them."""
        if (site, layer) not in self.values:
            captured = ", ".join(f"{known} {number}" for known, number in sorted(self.values)) or "nothing"
            raise ValueError(f"no activations of site '{site}' at layer {layer} were captured, only of: {captured}")
        return self.values[site, layer]


@dataclass(frozen=True, eq=False)
class GaussianNoise(Source):
    """Normal noise of standard deviation ``scale``, *added* where it is used.

    A token's noise depends on the seed, its item's number, the site, the layer and its position, so that an item gets the same
    noise in every batch, alone or with others, with and without padding. Embeddings are the site ``residual`` of layer 0.
    """

    scale: float
    seed: int = 0
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", real(self.scale, "scale of GaussianNoise"))
        object.__setattr__(self, "seed", integer(self.seed, "seed of GaussianNoise", least=0))
        if self.scale < 0:
            raise ValueError(f"scale must be 0 or more, got {self.scale}")
        object.__setattr__(self, "digest", f"{self.scale!r}-{self.seed}")

    def to_dict(self) -> dict:
        """All there is to it."""
        return {"kind": type(self).__name__, "scale": self.scale, "seed": self.seed}

    def draw(self, item: int, site: str, layer: int, n_tokens: int, width: int) -> torch.Tensor:
        """Noise of an item's first ``n_tokens`` tokens at one of ``SITES``, ``[token, width]``."""
        return torch.from_numpy(_normal(self.seed, item, SITES.index(site), layer, n_tokens, width)) * self.scale


# An array is [token, hidden]: some MB each for a large model.
@lru_cache(maxsize=16)
def _normal(seed: int, item: int, site: int, layer: int, n_tokens: int, width: int) -> np.ndarray:
    # Drawn row by row from one stream: a longer sequence begins with the same noise.
    return np.random.default_rng((seed, item, site, layer)).standard_normal((n_tokens, width)).astype(np.float32)
