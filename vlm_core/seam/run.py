"""One batch on its way through the layers: the state behind the seam.

``Run``    holds a compiled ``Program``, knows which token is what (``vlm_core.seam.views.Tokens``), and is called by the seam
           before every decoder layer (``enter_layer``), before and inside every attention (``enter_attention``, ``attend``), and after
           every attention and MLP module (``leave``)
``given``  what the language model is called with

A run may start from fewer sequences than it has rows. ``trunk[row]`` then names the row's sequence, and before the
first layer that a row touches the run gathers a new batch element for it: all that precedes is computed once. Rows that
touch nothing share one element to the end; ``elements`` says where each row ended up.

What is done has its own homes: ``vlm_core.seam.residual`` (patches, directions, tokens), ``vlm_core.seam.shortening`` (drops, merges),
``vlm_core.seam.attending`` (heads, keys and values, edges), ``vlm_core.seam.layer_inputs`` (positions and masks of what is left),
``vlm_core.seam.branching``. The run says when, and keeps the books.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import nn

from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions.policy import Visual
from vlm_core.seam.attending import AttentionEdits, Axes
from vlm_core.seam.branching import Branches
from vlm_core.seam.dropping import branched
from vlm_core.seam.layer_inputs import LayerInputs, counted_positions
from vlm_core.seam.plan import EMBEDDING, Program, require_fit
from vlm_core.seam.positions import Positioned
from vlm_core.seam.residual import StreamEdits
from vlm_core.seam.shortening import Shortening, Weighed
from vlm_core.seam.unrotated import unrotated
from vlm_core.seam.views import GROUPS, AttentionView, LayerView, Tokens

__all__ = ["Run", "given"]


class Run:
    """A program followed through one forward pass (or one ``generate``).

    Parameters
    ----------
    anatomy : Anatomy
        Of the model the run is for; modules of other models pass through untouched.
    program : Program
        One row per batch row.
    image, valid : BoolTensor ``[sequence, token]``
        Layout of the incoming batch: image tokens, and tokens that are not padding.
    trunk : int array ``[row]``, optional
        Sequence of each row. Default: row ``i`` is sequence ``i``.
    items : sequence of int, optional
        One number per sequence that names its item, for what is drawn at random. Default: the sequence's place in the batch.
    observers : sequence
        Objects with ``attention(view)``, ``layer(view)`` or ``site(site, layer, output, tokens)``; what they return is kept per layer
        in ``records``.
    left : bool, optional
        Side on which rows that lost more tokens than others are filled up. Default: left, where ``generate`` needs it,
        unless the batch is padded on the right.
    groups : mapping of str to BoolTensor ``[sequence, token]``, optional
        Named token groups, for interventions and observers.
    visual : sequence of Visual or None, one per sequence, optional
        What is known of their image tokens outside the decoder, for policies that ask.
    restores : bool
        Whether sequences that got shorter have their length again when they enter the final norm, zero where tokens are gone.
    seen : sequence of dict, one per sequence, optional
        What policies see of them, where other runs on the same sequences are to find it again.
    tokens : Tokens, optional
        Those of the incoming batch, where they are at hand: what they keep serves every run on it. Taken where there are no
        named groups and nothing is dropped.

    Raises
    ------
    ValueError
        One sentence: what the family lacks, or what this batch does not have (rows, groups, positions, as many tokens as a source).
    """

    plain = False
    """Whether it is a pass of the plain model, in which what is compiled is used."""
    alert = False
    """Whether layers and attentions are heard even where the program leaves them alone: for kinds of runs that do something of their own."""

    def __init__(
        self,
        anatomy: Anatomy,
        program: Program,
        image: torch.Tensor,
        valid: torch.Tensor,
        trunk: np.ndarray | None = None,
        items: Sequence[int] | None = None,
        observers: Sequence = (),
        left: bool | None = None,
        groups: Mapping[str, torch.Tensor] | None = None,
        tokens: Tokens | None = None,
        visual: Sequence[Visual | None] | None = None,
        restores: bool = False,
        seen: Sequence[dict] | None = None,
    ) -> None:
        n_sequences = image.shape[0]
        self.anatomy = anatomy
        self.program = program
        alone = Branches.none(n_sequences, program.n_layers)
        self._alone = alone.rows[-1]
        self.trunk = self._alone if trunk is None else np.asarray(trunk)
        if len(self.trunk) != program.n_rows:
            raise ValueError(f"{program.n_rows} interventions for {len(self.trunk)} rows: give one per row")
        self.items = list(range(n_sequences) if items is None else items)
        self.observers = tuple(observers)
        self._visual, self._seen = visual, seen
        self._restores = restores
        # The first layer whose keys are the sequence's: its cache counts tokens.
        self._own = anatomy.first_own_layer
        self._branches = alone if trunk is None else Branches.plan(program.first, self.trunk, program.n_layers)
        # Whether every layer has the tokens that came in.
        self._steady = not (self._branches.gather or program.drops or program.merges)
        self.elements_at = self._branches.elements_at
        self._image, self._valid = image, valid
        self._named = _named(groups, valid) if groups else {}
        self._left = bool(program.drops or program.merges) and bool(valid[:, -1].all()) if left is None else left
        numbered = tuple(enumerate(self.observers))
        self._attention_observers = [(number, one.attention) for number, one in numbered if hasattr(one, "attention")]
        self._layer_observers = [(number, one.layer) for number, one in numbered if hasattr(one, "layer")]
        self._site_observers = sited = [(number, one.site) for number, one in numbered if hasattr(one, "site")]
        self._attends = bool(self._attention_observers or sited)
        self._untouched = program.idle and self._steady
        self._idle = self._untouched and not (numbered or self.alert)
        self._heard = {} if self._idle else anatomy.attention_layers
        self.hears_modules = bool(sited) or (not self._untouched and any(site in ("attention", "mlp") for site, _ in program.edits))
        self.hears_layers = not self._idle and bool(
            self.alert
            or not self._untouched
            or self._layer_observers
            or sited
            or any(getattr(one, "reads_hidden", True) for one in self.observers if hasattr(one, "attention"))
        )
        if tokens is not None and self._steady and not self._named:
            self._start = tokens
        self._reads_unrotated = any(getattr(one, "reads_unrotated", False) for one in self.observers)
        self.hears_attentions = self._reads_unrotated
        if not self._untouched:
            self._prepare_edits()
        for one in self.observers:
            if hasattr(one, "require_there"):
                one.require_there(anatomy, self._start)
        self._begin()

    def _prepare_edits(self) -> None:
        anatomy, program = self.anatomy, self.program
        for capability, layer in program.needs:
            anatomy.require(capability, () if layer is None else (layer,))
        for tensor in (tensor for replaced in program.replacements for tensor in replaced.tensors):
            require_fit(tensor.shape[1:], anatomy.n_layers, anatomy.n_heads, anatomy.head_dim)
        self._where = Positioned(self._start)
        self._where.check(program.positions, self.trunk.tolist(), program.on_image)
        widths = {site: (anatomy.hidden_size,) for site in ("residual", "attention", "mlp")}
        widths["head"] = (anatomy.n_heads, anatomy.head_dim)
        self._stream = StreamEdits(program, self._where, self.trunk, self.items, widths)
        self._attention = AttentionEdits(program, anatomy.n_heads)
        self._inputs = LayerInputs(anatomy)
        self._shortening = Shortening(program, self._where, self.trunk, self.items, self._visual, self._seen)
        self.hears_attentions |= bool(self._shortening.unrotated)
        self._check_image_tokens()

    @cached_property
    def _start(self) -> Tokens:
        """Tokens of the incoming batch."""
        rows = torch.as_tensor(self._branches.rows[-1], device=self._image.device)
        return Tokens(self._image & self._valid, self._valid, rows, left=self._left, named=self._named)

    @property
    def tokens(self) -> Tokens:
        """Tokens of the layer that was entered last."""
        return self._start if self._shorter is None else self._shorter

    @property
    def shape(self) -> tuple[int, ...]:
        """Sequences and tokens of the incoming batch."""
        return tuple(self._valid.shape)

    # -- bookkeeping ------------------------------------------------------------------------------------------------

    def attention_layer(self, module: nn.Module) -> int | None:
        """Layer of an attention module of this run's language model, else None; None too where nothing is done in any."""
        return self._heard.get(module)

    def decoder_layer(self, module: nn.Module) -> int | None:
        """Layer of a decoder layer (``n_layers`` for the final norm) of this run's model, else None."""
        return self.anatomy.decoder_layers.get(module)

    def mlp_layer(self, module: nn.Module) -> int | None:
        """Layer of an MLP of this run's model, else None."""
        return self.anatomy.mlp_layers.get(module)

    @property
    def elements(self) -> np.ndarray:
        """Batch element that holds each row in the model's output, ``[row]``."""
        return self.elements_at[-1]

    def record(self, observer: int, layer: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """What an observer kept at ``layer`` in the last pass, one entry per row (of each tensor, where it keeps several by name).

        Raises
        ------
        ValueError
            Where it kept nothing there.
        """
        kept = self.records.get(observer, {}).get(layer)
        if kept is None:
            known = [sorted(self.records[number]) for number in self.records]
            raise ValueError(
                f"observer {observer} of this run kept nothing at layer {layer} (layers kept, by observer: {known}): call the model within "
                f"the run first, and ask for a layer that the observer looks at"
            )
        if isinstance(kept, dict):
            return {name: self._per_row(one, layer) for name, one in kept.items()}
        return self._per_row(kept, layer)

    def _per_row(self, kept: torch.Tensor, layer: int) -> torch.Tensor:
        elements = self.elements_at[layer]
        if elements is self._alone or np.array_equal(elements, np.arange(kept.shape[0])):
            return kept
        return kept[torch.as_tensor(elements, device=kept.device)]

    def _check_image_tokens(self) -> None:
        if not self.program.image_kv_tokens or not self.anatomy.family.image_in_sequence:
            return
        counts = self._start.image.sum(1).tolist()
        for replaced in self.program.image_kv_tokens.values():
            expected = replaced.tensors[0].shape[3]
            rows = torch.stack([mask.any(1) for mask in replaced.mask.values()]).any(0).nonzero()[:, 0].tolist()
            for row in rows:
                if counts[int(self.trunk[row])] != expected:
                    raise ValueError(
                        f"keys and values of {expected} image tokens cannot replace those of a prompt with "
                        f"{counts[int(self.trunk[row])]}: take them from an image of the same size, or their mean"
                    )

    def _begin(self) -> None:
        self.decoding = False
        self.records: dict[int, dict[int, torch.Tensor]] = {number: {} for number in range(len(self.observers))}
        self._shorter: Tokens | None = None
        self._generated = 0
        self._tokens_at: dict[int, Tokens] = {}
        self._weighed_at: dict[int, Weighed | None] = {}
        self._entered: torch.Tensor | None = None
        self._unrotated: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = {}
        if not self._untouched:
            self._inputs.forget()
            self._shortening.reset()

    # -- entering a layer -------------------------------------------------------------------------------------------

    def enter_layer(self, layer: int, args: tuple, kwargs: dict):
        """Branch, edit, shorten and observe before decoder layer ``layer``; None where nothing changes."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer == 0:
            self._enter_model(hidden.shape[:2], kwargs.get("past_key_values"))
        if self._untouched:
            if self.observers and not self.decoding:
                self._look(layer, hidden)
            return None
        if self.decoding:
            return self._decode_layer(layer, args, kwargs)
        before = hidden
        if layer in self._branches.gather:
            hidden = self._branch(layer, hidden)
        elements = self.elements_at[layer]
        if layer == 0 and (EMBEDDING, 0) in self._stream:
            hidden = self._stream.apply(EMBEDDING, 0, hidden, elements, self.tokens)
        if layer in self._shortening.layers:
            hidden, tokens = self._shortening.apply(layer, hidden, self.tokens)
            if tokens is not self.tokens:
                self._shorter = tokens
                self._inputs.forget()
        if ("residual", layer) in self._stream:
            hidden = self._stream.apply("residual", layer, hidden, elements, self.tokens)
        self._tokens_at[layer] = self.tokens
        self._weighed_at[layer] = self._shortening.weighed
        self._look(layer, hidden)
        if hidden is before and self.tokens.source is None and self.tokens.index is None:
            return None
        if layer < self.anatomy.n_layers:
            kwargs = self._inputs.select(kwargs, self.tokens)
        elif self._restores and self.tokens.index is not None:
            hidden = self._at_full_length(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _at_full_length(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens.on(hidden.device)
        element, place = tokens.valid.nonzero(as_tuple=True)
        whole = hidden.new_zeros(hidden.shape[0], self._start.valid.shape[1], hidden.shape[2])
        return whole.index_put((element, tokens.index[element, place]), hidden[element, place])

    def _look(self, layer: int, hidden: torch.Tensor) -> None:
        self._entered = hidden
        for number, observer in self._layer_observers:
            self._keep(number, layer, observer(LayerView(layer, hidden, self.tokens.on(hidden.device))))
        for number, observer in self._site_observers:
            self._keep(number, layer, observer("residual", layer, hidden, self.tokens))

    def enter_model(self, args: tuple, kwargs: dict) -> dict | None:
        """Refuse, before the language model runs, what would break inside it; its inputs, where they must change."""
        if not self.hears_layers:
            self._enter_model(given(args, kwargs).shape[:2], kwargs.get("past_key_values"))
        if self._untouched:
            return None
        n_deep = len(kwargs.get("deepstack_visual_embeds") or ())
        early = [layer for layer in (*self._shortening.layers, *self._branches.gather) if layer < n_deep]
        if early:
            raise ValueError(
                f"this family adds visual features after its first {n_deep} layers, to a sequence of the length it came with: "
                f"drop or merge tokens from layer {n_deep} on"
            )
        return self._count_positions(args, kwargs)

    def _count_positions(self, args: tuple, kwargs: dict) -> dict | None:
        if not self._attention.replaces_keys or bool(self._start.valid[:, 0].all()):
            return None
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length(self._own))
        generated = 0
        if past and self._own in self._tokens_at:
            new = given(args, kwargs).shape[1]
            generated = past + new - self._tokens_at[self._own].valid.shape[1]
        counted = counted_positions(kwargs, self._start.valid, past, generated)
        return None if counted is None else {**kwargs, "position_ids": counted}

    def _enter_model(self, shape: tuple[int, int], cache) -> None:
        past = 0 if cache is None else int(cache.get_seq_length(self._own))
        if past == 0:
            self._begin()
            if shape != self._valid.shape:
                self.refuse_batch(tuple(shape), tuple(self._valid.shape), cached=cache is not None)
            if (self.program.drops or self.program.merges) and getattr(cache, "is_compileable", False):
                raise ValueError(
                    "DropTokens and MergeTokens cannot shorten what a static cache holds, it has one place per token in every layer: use "
                    "the default (dynamic) cache"
                )
            if self._steady and not self._idle:
                self._tokens_at = dict.fromkeys(range(self.anatomy.n_layers + 1), self._start)
            return
        if self._idle:
            return
        if self._own not in self._tokens_at:
            raise ValueError(
                "the model was called with a cache that holds a past which this run did not see: start with the whole prompt"
            )
        self.decoding = True
        self._generated = past + shape[1] - self._tokens_at[self._own].valid.shape[1]

    @staticmethod
    def refuse_batch(entered: tuple[int, int], expected: tuple[int, int], cached: bool) -> None:
        """Say why sequences and tokens that ``entered`` the model are not those expected."""
        n_times, left_over = divmod(entered[0], expected[0])
        if n_times > 1 and not left_over and entered[1] == expected[1]:
            raise ValueError(
                f"{expected[0]} prompts entered the model as {entered[0]} sequences: beam search and several returned sequences are not "
                f"possible in a run, leave num_beams and num_return_sequences at 1 (or encode each prompt {n_times} times)"
            )
        if not cached and entered[0] == expected[0] and entered[1] > expected[1]:
            raise ValueError(
                f"prompts of {expected[1]} tokens came back with {entered[1]} and no cache: use_cache=False cannot generate in a run, "
                f"leave the cache on (a single forward pass needs none)"
            )
        raise ValueError(
            f"the batch that entered the model is {entered} (sequences, tokens), the run was made for {expected}: pass the batch that "
            f"the model is called with"
        )

    def _keep(self, number: int, layer: int, record: torch.Tensor | None) -> None:
        if record is not None:
            self.records[number][layer] = record

    def _branch(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        device = self.tokens.valid.device
        gather = torch.as_tensor(self._branches.gather[layer], device=device)
        self._shorter = branched(self.tokens, gather, torch.as_tensor(self._branches.rows[layer], device=device))
        self._inputs.forget()
        self._shortening.branch(gather)
        return hidden[gather.to(hidden.device)]

    # -- generating -------------------------------------------------------------------------------------------------

    def _decode_layer(self, layer: int, args: tuple, kwargs: dict):
        tokens = self._tokens_at[layer]
        hidden = args[0] if args else kwargs["hidden_states"]
        edited = hidden
        if ("residual", layer) in self._stream:
            length = tokens.valid.shape[1] + self._generated
            edited = self._stream.apply("residual", layer, hidden, self.elements_at[layer], tokens, length)
        if tokens.index is not None and layer < self.anatomy.n_layers and layer not in self.anatomy.cross_layers:
            n_prompt = self._start.valid.shape[1]
            mask = self._inputs.decoding_mask(layer, tokens, hidden, kwargs, n_prompt, self._generated)
            kwargs = {**kwargs, "attention_mask": mask}
        elif edited is hidden:
            return None
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    # -- attention and what modules give back -----------------------------------------------------------------------

    def enter_attention(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Ask the attention module of ``layer`` for its queries and keys without rotary positions, where anyone reads them."""
        if not self.decoding and (self._reads_unrotated or (not self._untouched and layer in self._shortening.unrotated)):
            self._unrotated[layer] = unrotated(module, args, kwargs)

    def attend(self, layer, original, module, query, key, value, mask, *args, **kwargs):
        """The attention of ``layer`` with this run's interventions."""
        if self._untouched:
            output, maps = original(module, query, key, value, mask, *args, **kwargs)
            if self._attends and not self.decoding:
                tokens = self._tokens_at[layer].on(query.device)
                key, value, mask = self._written(layer, tokens, key, value, mask)
                self._observe(self._view(layer, tokens, query, key, value, output, mask, kwargs))
            return output, maps
        weighed = self._weighed_at.get(layer)
        edited = layer in self._attention.layers or ("head", layer) in self._stream or weighed is not None
        seen = not self.decoding and (self._attends or layer in self._shortening.reading)
        if not (edited or seen):
            return original(module, query, key, value, mask, *args, **kwargs)
        tokens = self._tokens_at[layer].on(query.device)
        key, value, mask = self._written(layer, tokens, key, value, mask)
        axes = self._axes(layer, tokens, query, key)
        weights = None if axes.crossed else self.key_weights(layer, axes.n_keys, query.device)
        own_key = key
        output, maps, key, value, mask = self._attention.attend(
            layer, axes, original, module, query, key, value, mask, weights, *args, **kwargs
        )
        if ("head", layer) in self._stream and not self.decoding:
            output = self._stream.apply("head", layer, output, self.elements_at[layer], axes.tokens)
        output = self._attention.silence(layer, axes, output)
        if seen:
            view = self._view(layer, axes.tokens, query, key, value, output, mask, kwargs)
            if layer in self._shortening.scored:
                self._shortening.read(scores=view.probabilities(view.tokens.last[:, None])[:, :, 0].mean(1))
            if layer in self._shortening.keyed:
                self._shortening.read(keys=own_key.float().mean(1))
            if layer in self._shortening.viewed:
                self._shortening.look(view)
            if layer in self._shortening.unrotated:
                self._shortening.look(view, "unrotated")
            self._observe(view)
        return output, maps

    def key_weights(self, layer: int, n_keys: int, device: torch.device) -> torch.Tensor | None:
        """What merged tokens add to the scores of each of the last ``n_keys`` keys, ``[element, key]``; None where nothing is added."""
        weighed = self._weighed_at.get(layer)
        if weighed is None:
            return None
        length = self._tokens_at[layer].valid.shape[1] + self._generated
        weights = weighed.log_sizes(length)
        return None if weights is None else weights.to(device)[:, length - n_keys :]

    def _view(self, layer: int, tokens: Tokens, query, key, value, output, mask, kwargs: dict) -> AttentionView:
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        crossed, flat = layer in self.anatomy.cross_layers, self._unrotated.pop(layer, None) if self._unrotated else None
        return AttentionView(layer, query, key, value, output, mask, scaling, kwargs.get("softcap"), tokens, self._entered, crossed, flat)

    def _written(self, layer: int, tokens: Tokens, key, value, mask) -> tuple:
        """Keys, values and mask without the places of a static cache that no token has been written to."""
        length = tokens.valid.shape[1] + self._generated
        if key.shape[2] <= length or layer in self.anatomy.cross_layers:
            return key, value, mask
        return key[:, :, :length], value[:, :, :length], mask if mask is None else mask[..., :length]

    def _axes(self, layer: int, tokens: Tokens, query: torch.Tensor, key: torch.Tensor) -> Axes:
        length = tokens.valid.shape[1] + self._generated
        return Axes(self._where, tokens, length, query.shape[2], key.shape[2], layer in self.anatomy.cross_layers)

    def _observe(self, view: AttentionView) -> None:
        layer = view.layer
        for number, observer in self._attention_observers:
            self._keep(number, layer, observer(view))
        for number, observer in self._site_observers:
            self._keep(number, layer, observer("head", layer, view.output, view.tokens))

    def leave(self, site: str, layer: int, output):
        """What the attention or MLP module of ``layer`` gives back, patched and observed; None where nothing changes."""
        edited = (site, layer) in self.program.edits
        if self.decoding or not (edited or self._site_observers) or layer not in self._tokens_at:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        tokens = self._tokens_at[layer].on(hidden.device)
        # Some families (OPT) hand their MLP all tokens in one row.
        shaped = hidden.view(*tokens.valid.shape, -1)
        after = self._stream.apply(site, layer, shaped, self.elements_at[layer], tokens) if edited else shaped
        for number, observer in self._site_observers:
            self._keep(number, layer, observer(site, layer, after, tokens))
        if after is shaped:
            return None
        after = after.view(hidden.shape)
        return (after, *output[1:]) if isinstance(output, tuple) else after


def given(args: tuple, kwargs: dict) -> torch.Tensor:
    """What the language model is called with: embeddings, or tokens by name or in the first place."""
    embeds = kwargs.get("inputs_embeds")
    if embeds is not None:
        return embeds
    tokens = kwargs.get("input_ids")
    return args[0] if tokens is None else tokens


def _named(groups: Mapping[str, torch.Tensor], valid: torch.Tensor) -> dict[str, torch.Tensor]:
    for name, members in groups.items():
        if name in GROUPS and name != "answer":
            raise ValueError(f"token group '{name}' is one that every prompt has: give yours another name")
        if members.dtype != torch.bool or tuple(members.shape) != tuple(valid.shape):
            raise ValueError(
                f"token group '{name}' is {members.dtype} of shape {tuple(members.shape)}, the batch is {tuple(valid.shape)} (sequences, "
                f"tokens): give one boolean per token"
            )
    return {name: members.to(valid.device) for name, members in groups.items()}
