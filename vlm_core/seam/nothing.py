"""A run in which nothing is done and nobody looks.

``Nothing``    the run of ``Subject.intervene(None, batch)``: a pass of the plain model, refused where it is on another batch
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from vlm_core.families.anatomy import Anatomy
from vlm_core.seam.plan import Program
from vlm_core.seam.run import Run, given

if TYPE_CHECKING:
    from vlm_core.subjects.batch import Batch

__all__ = ["Nothing"]


class Nothing(Run):
    """The run of a plain pass on ``batch``. What it knows of tokens, rows and records is worked out when it is first asked for.

    Parameters
    ----------
    anatomy : Anatomy
    batch : Batch
    """

    plain = True
    hears_layers = hears_modules = hears_attentions = False

    def __init__(self, anatomy: Anatomy, batch: Batch) -> None:
        self.anatomy = anatomy
        self._batch = batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "program" in self.__dict__:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        batch, anatomy = self._batch, self.anatomy
        program = Program.compile([None] * len(batch), anatomy.n_layers, anatomy.n_heads)
        groups = None if batch.labels is None else {"answer": batch.labels != -100}
        tokens = None if groups else batch.tokens
        super().__init__(anatomy, program, batch.image, batch.valid, items=batch.items, groups=groups, tokens=tokens)
        return getattr(self, name)

    def attention_layer(self, module: nn.Module) -> None:
        """None: it hears no attention."""

    def decoder_layer(self, module: nn.Module) -> None:
        """None: it hears no layer."""

    def mlp_layer(self, module: nn.Module) -> None:
        """None: it hears no MLP."""

    def enter_model(self, args: tuple, kwargs: dict) -> None:
        """Refuse another batch; the next tokens of one that is in a cache are welcome."""
        cache, expected = kwargs.get("past_key_values"), self._batch.valid.shape
        entered = given(args, kwargs).shape[:2]
        if entered != expected and (cache is None or not int(cache.get_seq_length(self.anatomy.first_own_layer))):
            self.refuse_batch(tuple(entered), tuple(expected), cached=cache is not None)
