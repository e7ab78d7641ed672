"""The one seam: where everything looks into a model or changes it.

``install(model, anatomy)``   put the seam on the language model; identity until a run is active
``active(run)``               context manager: make a ``Run`` the active one in this context (thread, task)
``capturing()``               context manager: stop before the language model and keep what it would have received

Two attention names are registered with transformers, each with its own mask function (a name without one silently gets
no causal mask): ``vlm_core`` delegates to the model's sdpa, ``vlm_core_eager`` to its eager attention. With no active
run the original function is called with the original arguments, so the numbers are bit-identical. Pre-hooks on decoder
layers branch rows off their trunk, drop tokens, read and edit the residual stream; hooks on attention and MLP modules
read and edit what they add to it. Every hook makes a forward pass slower and few runs need all of them, so that each kind is there only
from a run that asks for it (``hears_layers``, ``hears_modules``) to one that does not, ahead of anyone else's hooks.

What is active is a ``Run`` or anything with its methods ``attention_layer``, ``decoder_layer``, ``enter_layer`` and ``attend``; those it
has no use for, ``enter_model`` and ``leave`` with ``hears_modules``, may be missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from weakref import WeakKeyDictionary, ref

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from vlm_core.errors import SubjectError
from vlm_core.families.anatomy import Anatomy
from vlm_core.seam.run import Run

__all__ = ["ATTENTION_NAMES", "Captured", "Seam", "active", "capturing", "current_run", "install"]

ATTENTION_NAMES = {"sdpa": "vlm_core", "eager": "vlm_core_eager"}

_ACTIVE: ContextVar[Run | None] = ContextVar("vlm_core_run", default=None)
_CAPTURING: ContextVar[bool] = ContextVar("vlm_core_capturing", default=False)
_INSTALLED: WeakKeyDictionary[nn.Module, Seam] = WeakKeyDictionary()
_LISTENERS: WeakKeyDictionary[nn.Module, Seam] = WeakKeyDictionary()


def current_run() -> Run | None:
    """The run that is active in this context, if any."""
    return _ACTIVE.get()


class active:  # noqa: N801 (used as a function)
    """Make ``run`` the active one; the previous state is back on exit, exceptions included."""

    def __init__(self, run: Run | None) -> None:
        self._run = run
        anatomy = getattr(run, "anatomy", None)
        self._seam = None if anatomy is None else _LISTENERS.get(anatomy.language_model)

    def __enter__(self) -> Run | None:
        run = self._run
        if self._seam is not None:
            self._seam.begin(run)
        self._token = _ACTIVE.set(run)
        return run

    def __exit__(self, *error) -> None:
        _ACTIVE.reset(self._token)
        if self._seam is not None:
            self._seam.end(self._run)


class Captured(Exception):
    """Raised before the language model runs while ``capturing``; ``inputs`` is what it was called with."""

    def __init__(self, inputs: dict) -> None:
        super().__init__("stopped before the language model")
        self.inputs = inputs


@contextmanager
def capturing() -> Iterator[None]:
    """In this context, calling a model with the seam raises ``Captured`` instead of running its language model."""
    token = _CAPTURING.set(True)
    try:
        yield
    finally:
        _CAPTURING.reset(token)


def _original(module: nn.Module, implementation: str):
    # Looked up in the modelling file itself: a model may override an implementation in its local registry.
    modelling = sys.modules[type(module).__module__]
    if implementation == "eager":
        return modelling.eager_attention_forward
    return modelling.ALL_ATTENTION_FUNCTIONS[implementation]


def _attention_like(implementation: str):
    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        original = _original(module, implementation)
        run = _ACTIVE.get()
        layer = None if run is None else run.attention_layer(module)
        if layer is None:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        return run.attend(layer, original, module, query, key, value, attention_mask, *args, **kwargs)

    return attention


for _implementation, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(ATTENTION_NAMES[_implementation], _attention_like(_implementation))
    AttentionMaskInterface.register(ATTENTION_NAMES[_implementation], _mask)


def _before_layer(module: nn.Module, args: tuple, kwargs: dict):
    run = _ACTIVE.get()
    layer = None if run is None else run.decoder_layer(module)
    return None if layer is None else run.enter_layer(layer, args, kwargs)


def _before_language_model(module: nn.Module, args: tuple, kwargs: dict):
    if _CAPTURING.get():
        raise Captured(kwargs)
    run = _ACTIVE.get()
    if hasattr(run, "enter_model") and run.anatomy.language_model is module:
        kwargs = run.enter_model(kwargs)
        return None if kwargs is None else (args, kwargs)
    return None


def _after_attention(module: nn.Module, args: tuple, output):
    run = _ACTIVE.get()
    layer = run.attention_layer(module) if hasattr(run, "leave") else None
    return None if layer is None else run.leave("attention", layer, output)


def _after_mlp(module: nn.Module, args: tuple, output):
    run = _ACTIVE.get()
    layer = run.mlp_layer(module) if hasattr(run, "leave") else None
    return None if layer is None else run.leave("mlp", layer, output)


class Seam:
    """The seam on one model. ``remove()`` gives back the original attention and all hooks."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, name: str = "subject") -> None:
        # A family that does not fit is refused before anything is done to the model.
        self._layers = _Hooks([(module, _before_layer) for module in (*anatomy.layers, anatomy.norm)], before=True)
        modules = [(module, _after_attention) for module in anatomy.attentions] + [(module, _after_mlp) for module in anatomy.mlps]
        self._modules = _Hooks(modules, before=False)
        self._lock = Lock()
        text_config = model.config.get_text_config()
        self._model = ref(model)
        named = text_config._attn_implementation
        # A copied model comes with the seam's name and hooks, which then belong to no one.
        self.original = next((own for own, name_ in ATTENTION_NAMES.items() if name_ == named), named)
        self._key = next(
            (key for key in model.config.sub_configs if getattr(model.config, key, None) is text_config), None
        )
        if self.original not in ATTENTION_NAMES:
            raise SubjectError(
                f"subject '{name}' uses attention '{self.original}': load it with attn_implementation 'sdpa' or "
                f"'eager', the seam delegates to one of them."
            )
        if self._key is None or not anatomy.language_model._can_set_attn_implementation():
            raise SubjectError(
                f"subject '{name}' ({type(model).__name__}) has no attention-interface support in its language model: "
                f"heads cannot be observed or changed without re-implementing it; choose a model that dispatches "
                f"through transformers' AttentionInterface."
            )
        model.set_attn_implementation({self._key: ATTENTION_NAMES[self.original]})
        entrance = anatomy.language_model
        for hooks in (self._layers, self._modules):
            hooks.clear()
        for key in [key for key, found in entrance._forward_pre_hooks.items() if found is _before_language_model]:
            del entrance._forward_pre_hooks[key]
            entrance._forward_pre_hooks_with_kwargs.pop(key, None)
        self._entrance = entrance.register_forward_pre_hook(_before_language_model, with_kwargs=True)
        _LISTENERS[entrance] = self

    def begin(self, run: Run) -> None:
        """``run`` becomes active in some context: from here on there are the hooks that it hears by."""
        with self._lock:
            self._layers.begin(getattr(run, "hears_layers", True))
            self._modules.begin(getattr(run, "hears_modules", False))

    def end(self, run: Run) -> None:
        """``run`` is active no longer; its hooks stay until a run comes that needs none, unless another still hears by them."""
        with self._lock:
            self._layers.end(getattr(run, "hears_layers", True))
            self._modules.end(getattr(run, "hears_modules", False))

    def remove(self) -> None:
        """Restore the model as it was before ``install``."""
        with self._lock:
            self._entrance.remove()
            self._layers.close()
            self._modules.close()
        model = self._model()
        if model is not None:
            model.set_attn_implementation({self._key: self.original})
            _INSTALLED.pop(model, None)


class _Hooks:
    """Hooks of one kind on the modules of a model, there while some run hears by them and until one comes that does not."""

    def __init__(self, hooked: Sequence[tuple[nn.Module, Callable]], before: bool) -> None:
        self._hooked = list(hooked)
        self._before = before
        self._hearing = 0
        self._handles: list = []

    def clear(self) -> None:
        """Take off what a copied model came with."""
        for module, hook in self._hooked:
            hooks = module._forward_pre_hooks if self._before else module._forward_hooks
            for key in [key for key, found in hooks.items() if found is hook]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)

    def begin(self, hears: bool) -> None:
        """A run begins that hears by these, or does not."""
        if not hears:
            if self._handles and not self._hearing:
                self._off()
            return
        self._hearing += 1
        if not self._handles:
            for module, hook in self._hooked:
                if self._before:
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
                else:
                    self._handles.append(module.register_forward_hook(hook, prepend=True))

    def end(self, hears: bool) -> None:
        """Such a run ends."""
        self._hearing -= bool(hears)

    def close(self) -> None:
        """Off for good: not to be woken again by a run that outlives the seam."""
        self._off()
        self._hooked = []

    def _off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def install(model: nn.Module, anatomy: Anatomy, name: str = "subject") -> Seam:
    """Put the seam on ``model`` (once: a second call gives back the first seam).

    Raises
    ------
    SubjectError
        If the language model does not dispatch its attention through transformers' ``AttentionInterface``.
    """
    if model not in _INSTALLED:
        _INSTALLED[model] = Seam(model, anatomy, name)
    return _INSTALLED[model]
