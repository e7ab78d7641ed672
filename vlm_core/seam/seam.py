"""The one seam: where everything looks into a model or changes it.

``install(model, anatomy)``   put the seam on the language model; identity until a run is active
``active(run)``               context manager: make a ``Run`` the active one in this context (thread, task)
``capturing()``               context manager: stop before the language model and keep what it would have received
``attending(module, how)``    context manager: one attention module attends as ``how`` says

Two attention names are registered with transformers, each with its own mask function (a name without one silently gets
no causal mask): ``vlm_core`` delegates to the model's sdpa, ``vlm_core_eager`` to its eager attention. With no active
run, and outside ``attending``, the original function is called with the original arguments, so the numbers are bit-identical. Pre-hooks on decoder
layers branch rows off their trunk, drop tokens, read and edit the residual stream; hooks on attention and MLP modules
read and edit what they add to it; pre-hooks on attention modules ask them for queries and keys without rotary positions. Every hook makes
a forward pass slower and few runs need all of them, so that each kind is there only from a run that asks for it (``hears_layers``,
``hears_modules``, ``hears_attentions``) to one that does not, ahead of anyone else's hooks. What ``torch.compile`` made leaves later
hooks out: while a run that is not ``plain`` is active, the model runs as it was written (``vlm_core.seam.eagerly``).

What is active is a ``Run`` or anything with its methods ``attention_layer``, ``decoder_layer``, ``enter_layer`` and ``attend``; those it
has no use for, ``enter_model``, ``leave`` with ``hears_modules``, ``enter_attention`` with ``hears_attentions``, and ``plain``, may be
missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from threading import Lock
from weakref import WeakKeyDictionary, ref

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from vlm_core.errors import SubjectError
from vlm_core.families.anatomy import Anatomy
from vlm_core.seam.eagerly import eagerly
from vlm_core.seam.run import Run

__all__ = [
    "ATTENTION_NAMES", "Captured", "Seam", "active", "attending", "capturing", "current_run", "install", "original_attention", "require_asleep",
    "run_at",
]  # fmt: skip

ATTENTION_NAMES = {"sdpa": "vlm_core", "eager": "vlm_core_eager"}

# What is active, the last to come first: one run a model, or one that hides all others.
_ACTIVE: ContextVar[tuple[Run, ...]] = ContextVar("vlm_core_runs", default=())
_CAPTURING: ContextVar[bool] = ContextVar("vlm_core_capturing", default=False)
_ATTENDING: ContextVar[tuple[tuple[nn.Module, Callable], ...]] = ContextVar("vlm_core_attending", default=())
_INSTALLED: WeakKeyDictionary[nn.Module, Seam] = WeakKeyDictionary()
_LISTENERS: WeakKeyDictionary[nn.Module, Seam] = WeakKeyDictionary()


def current_run() -> Run | None:
    """The run that is active in this context, if any."""
    return next(iter(_ACTIVE.get()), None)


def run_at(attention: nn.Module) -> tuple[Run, int] | tuple[None, None]:
    """The run that hears an attention module in this context, and its layer: of several active ones, that of the module's own model."""
    for run in _ACTIVE.get():
        layer = run.attention_layer(attention)
        if layer is not None:
            return run, layer
    return None, None


def require_asleep(anatomy: Anatomy, what: str) -> None:
    """Refuse to begin what makes passes of its own while a run is active on the model: it would be left out of them.

    Raises
    ------
    RuntimeError
    """
    if any(hasattr(run, "anatomy") and run.anatomy.language_model is anatomy.language_model for run in _ACTIVE.get()):
        raise RuntimeError(f"{what} inside an active run would not be intervened on: leave it first, and pass the intervention along")


class active:  # noqa: N801 (used as a function)
    """Make ``run`` the active one of its model; the previous state is back on exit, exceptions included.

    Runs of other models stay active beside it. ``None``, and what has no ``anatomy``, stand alone.

    Raises
    ------
    SubjectError
        On entry, where the model has lost its seam (it was removed, or another attention was set), and inside a compiled function.
    """

    def __init__(self, run: Run | None) -> None:
        self._run = run
        anatomy = getattr(run, "anatomy", None)
        self._model = None if anatomy is None else anatomy.language_model

    def __enter__(self) -> Run | None:
        run, model, self._seam = self._run, self._model, None
        if model is None:
            runs = () if run is None else (run,)
        else:
            seam = _LISTENERS.get(model)
            if seam is None:
                raise SubjectError("the seam of this model was removed: make a new subject with Subject(model, processor)")
            seam.begin(run)
            self._seam, runs = seam, (run,)
            if others := _ACTIVE.get():
                runs += tuple(one for one in others if hasattr(one, "anatomy") and one.anatomy.language_model is not model)
        self._token = _ACTIVE.set(runs)
        return run

    def __exit__(self, *error) -> None:
        try:
            _ACTIVE.reset(self._token)
        finally:
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
        with eagerly:
            yield
    finally:
        _CAPTURING.reset(token)


@contextmanager
def attending(module: nn.Module, how: Callable) -> Iterator[None]:
    """In this context an attention module calls ``how(original, module, query, key, value, mask, ...)`` where it called ``original``.

    A run that is active on the model does so too, after its own edits of keys, values and mask, and before those of outputs. What
    ``torch.compile`` made is not used meanwhile.
    """
    token = _ATTENDING.set((*_ATTENDING.get(), (module, how)))
    try:
        with eagerly:
            yield
    finally:
        _ATTENDING.reset(token)


def original_attention(module: nn.Module, implementation: str):
    """What ``module`` attends with under ``implementation`` ("sdpa" or "eager")."""
    # Looked up in the modelling file itself: a model may override an implementation in its local registry.
    modelling = sys.modules[type(module).__module__]
    if implementation == "eager":
        return modelling.eager_attention_forward
    return modelling.ALL_ATTENTION_FUNCTIONS[implementation]


def _attention_like(implementation: str):
    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        original = original_attention(module, implementation)
        for other, how in _ATTENDING.get():
            if other is module:
                original = partial(how, original)
        run, layer = run_at(module)
        if run is not None:
            return run.attend(layer, original, module, query, key, value, attention_mask, *args, **kwargs)
        return original(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


for _implementation, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(ATTENTION_NAMES[_implementation], _attention_like(_implementation))
    AttentionMaskInterface.register(ATTENTION_NAMES[_implementation], _mask)


def _before_layer(module: nn.Module, args: tuple, kwargs: dict | None = None):
    if kwargs is None:
        # Another thread took the hook off while torch was about to call it: no run in this one hears by it.
        return None
    for run in _ACTIVE.get():
        layer = run.decoder_layer(module)
        if layer is not None:
            return run.enter_layer(layer, args, kwargs)
    return None


def _before_language_model(module: nn.Module, args: tuple, kwargs: dict):
    if _CAPTURING.get():
        raise Captured(kwargs)
    for run in _ACTIVE.get():
        if hasattr(run, "enter_model") and run.anatomy.language_model is module:
            kwargs = run.enter_model(args, kwargs)
            return None if kwargs is None else (args, kwargs)
    return None


def _before_attention(module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
    if kwargs is None:
        # As before a layer.
        return
    run, layer = run_at(module)
    if hasattr(run, "enter_attention"):
        run.enter_attention(layer, module, args, kwargs)


def _after_attention(module: nn.Module, args: tuple, output):
    run, layer = run_at(module)
    return run.leave("attention", layer, output) if hasattr(run, "leave") else None


def _after_mlp(module: nn.Module, args: tuple, output):
    for run in _ACTIVE.get():
        layer = run.mlp_layer(module) if hasattr(run, "leave") else None
        if layer is not None:
            return run.leave("mlp", layer, output)
    return None


class Seam:
    """The seam on one model. ``remove()`` gives back the original attention and all hooks."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, name: str = "subject") -> None:
        # A family that does not fit is refused before anything is done to the model.
        layers = _Hooks([(module, _before_layer) for module in (*anatomy.layers, anatomy.norm)], before=True)
        modules = [(module, _after_attention) for module in anatomy.attentions] + [(module, _after_mlp) for module in anatomy.mlps]
        attentions = _Hooks([(module, _before_attention) for module in anatomy.attentions], before=True)
        self._several = (layers, _Hooks(modules, before=False), attentions)
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
        self._text_config = text_config
        self._entrance = _Hooks([(anatomy.language_model, _before_language_model)], before=True)
        for hooks in (self._entrance, *self._several):
            hooks.clear()
        self._entrance.begin(True)
        self._language_model = anatomy.language_model
        _LISTENERS[anatomy.language_model] = self

    @property
    def in_place(self) -> bool:
        """Whether the language model still dispatches its attention to the seam."""
        config = self._text_config
        # Where the configuration keeps it: by its property, looking takes longer than all else that a run that does nothing costs.
        named = object.__getattribute__(config, "__dict__").get("_attn_implementation_internal") or config._attn_implementation
        return named == ATTENTION_NAMES[self.original]

    def begin(self, run: Run) -> None:
        """``run`` becomes active in some context: from here on nothing compiled is used, and hooks that it hears by come first."""
        if not self.in_place:
            raise SubjectError(
                f"attention '{self._text_config._attn_implementation}' was set on this model after the seam was put on it, so that nothing "
                f"could be seen or changed: make a new subject with Subject(model, processor)"
            )
        if not getattr(run, "plain", False):
            eagerly.__enter__()
        heard = _heard_by(run)
        if any(heard) or not self._rests:
            with self._lock:
                self._entrance.restore()
                for hooks, hears in zip(self._several, heard, strict=True):
                    hooks.begin(hears)

    def end(self, run: Run) -> None:
        """``run`` is active no longer; its hooks stay until a run comes that needs none, unless another still hears by them."""
        heard = _heard_by(run)
        if any(heard):
            with self._lock:
                for hooks, hears in zip(self._several, heard, strict=True):
                    hooks.end(hears)
        if not getattr(run, "plain", False):
            eagerly.__exit__()

    @property
    def _rests(self) -> bool:
        """Whether there are the hooks that there are without any run, and no others."""
        layers, modules, attentions = self._several
        return not (layers.on or modules.on or attentions.on) and self._entrance.there

    def remove(self) -> None:
        """Restore the model as it was before ``install``; a second time does nothing."""
        if _LISTENERS.get(self._language_model) is not self:
            return
        with self._lock:
            for hooks in (self._entrance, *self._several):
                hooks.off()
            del _LISTENERS[self._language_model]
        model = self._model()
        if model is not None:
            if self.in_place:
                model.set_attn_implementation({self._key: self.original})
            _INSTALLED.pop(model, None)


def _heard_by(run: Run) -> tuple[bool, bool, bool]:
    """By which hooks a run hears: before layers, after modules, before attention modules."""
    return getattr(run, "hears_layers", True), getattr(run, "hears_modules", False), getattr(run, "hears_attentions", False)


class _Hooks:
    """Hooks of one kind on the modules of a model, there while some run hears by them and until one comes that does not."""

    def __init__(self, hooked: Sequence[tuple[nn.Module, Callable]], before: bool) -> None:
        self._hooked = list(hooked)
        self._before = before
        self._hearing = 0
        self._handles: list = []

    def _of(self, module: nn.Module):
        return module._forward_pre_hooks if self._before else module._forward_hooks

    def clear(self) -> None:
        """Take off what a copied model came with."""
        for module, hook in self._hooked:
            hooks = self._of(module)
            for key in [key for key, found in hooks.items() if found is hook]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)

    @property
    def on(self) -> bool:
        """Whether there are any."""
        return bool(self._handles)

    @property
    def there(self) -> bool:
        """Whether there are all of them, none cleared by someone."""
        for handle, (module, _) in zip(self._handles, self._hooked, strict=False):
            if handle.id not in self._of(module):
                return False
        return self.on

    def begin(self, hears: bool) -> None:
        """A run begins that hears by these, or does not."""
        if not hears:
            if self._handles and not self._hearing:
                self.off()
            return
        self._hearing += 1
        self.restore(first=True)

    def restore(self, first: bool = False) -> None:
        """On, where they were not or someone has cleared them; ``first``: ahead of all hooks that came since."""
        for handle, (module, _) in zip(self._handles, self._hooked, strict=False):
            hooks = self._of(module)
            if handle.id not in hooks:
                self.off()
                break
            if first and next(iter(hooks)) != handle.id:
                hooks.move_to_end(handle.id, last=False)
        if not self._handles:
            for module, hook in self._hooked:
                if self._before:
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
                else:
                    self._handles.append(module.register_forward_hook(hook, prepend=True))

    def end(self, hears: bool) -> None:
        """Such a run ends."""
        self._hearing -= bool(hears)

    def off(self) -> None:
        """Take them off."""
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
    seam = _INSTALLED.get(model)
    if seam is not None and not seam.in_place:
        seam.remove()
        seam = None
    if seam is None:
        seam = _INSTALLED[model] = Seam(model, anatomy, name)
    return seam
