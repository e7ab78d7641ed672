"""The work done with plain transformers and forward hooks: the reference for numbers and for time.

``PlainHooks``           one forward pass for each intervention (or a few in a batch), as hook scripts have it
``OutputAttentions``     attention maps by ``output_attentions=True``
``LlamaHead``            what a head's text queries get to see when image keys and values are replaced

The hooks do no more than they must: the merged embeddings of the prompt are at hand, only the last token is unembedded, and a replaced
head is computed for text queries only, from what the model's own ``q_proj``, ``k_proj`` and ``v_proj`` have just returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from vlm_core import HeadId
from vlm_core.bench.subjects import Case, Prompt, own_tree

__all__ = ["HOOKS", "LlamaHead", "OutputAttentions", "PlainHooks", "text_mass"]

HOOKS = "plain hooks"


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class LlamaHead:
    """One head of one prompt, for tools that show projections.

    Parameters
    ----------
    case : Case
    prompt : Prompt
    head : HeadId
    """

    def __init__(self, case: Case, prompt: Prompt, head: HeadId) -> None:
        anatomy = case.subject.anatomy
        size = anatomy.head_dim
        self.layer = head.layer
        self.own = slice(head.head * size, (head.head + 1) * size)
        shared = head.head // anatomy.kv_groups
        self.shared = slice(shared * size, (shared + 1) * size)
        self.scaling = size**-0.5
        self.text, self.image = prompt.text, prompt.image
        self.cos, self.sin = prompt.cos[0], prompt.sin[0]
        self.mean_key, self.mean_value = (means[head.layer, head.head].to(prompt.embeds) for means in (case.means.keys, case.means.values))

    def rotated(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From ``q_proj`` and ``k_proj`` outputs ``[token, width]``: this head's text queries and its keys, rotated."""
        text = self.text
        query = _rotate(query[text, self.own], self.cos[text], self.sin[text])
        return query, _rotate(key[:, self.shared], self.cos, self.sin)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Output ``[text, head_dim]`` of rotated queries on ``key``, ``value`` ``[token, head_dim]`` with the image's replaced."""
        key = torch.where(self.image[:, None], self.mean_key, key)
        value = torch.where(self.image[:, None], self.mean_value, value)
        scores = query @ key.T * self.scaling
        later = torch.arange(key.shape[0], device=key.device) > self.text[:, None]
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ value

    def replaced(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The same from projections ``[token, width]``."""
        return self.attend(*self.rotated(query, key), value[:, self.shared])


def text_mass(query: torch.Tensor, key: torch.Tensor, prompt: Prompt, heads: int, kv_heads: int) -> torch.Tensor:
    """Share of attention ``[head]`` that text queries give to the image, from projections ``[token, width]``."""
    n, text = query.shape[0], prompt.text
    query = query[text].view(len(text), heads, -1).transpose(0, 1)
    key = key.view(n, kv_heads, -1).transpose(0, 1).repeat_interleave(heads // kv_heads, dim=0)
    query = _rotate(query, prompt.cos[0, text], prompt.sin[0, text])
    scores = query @ _rotate(key, prompt.cos[0], prompt.sin[0]).transpose(1, 2) * query.shape[-1] ** -0.5
    later = torch.arange(n, device=text.device) > text[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1)[..., prompt.image].sum(-1).mean(1)


class PlainHooks:
    """Plain transformers, ``rows`` interventions in one forward pass.

    Every method returns what the model says at the last token, ``[intervention, vocabulary]``.
    """

    def __init__(self, case: Case, rows: int = 1) -> None:
        self.case = case
        self.rows = rows
        self.name = HOOKS if rows == 1 else f"{HOOKS}, {rows} rows a pass"
        self.model = case.plain
        self.attentions = [layer.self_attn for layer in self.model.model.language_model.layers]

    def forward(self, prompt: Prompt, rows: int = 1) -> torch.Tensor:
        """The model as it is."""
        embeds = prompt.embeds if rows == 1 else prompt.embeds.expand(rows, -1, -1)
        with torch.inference_mode():
            return self.model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1]

    def zero_heads(self, prompt: Prompt, heads: Sequence[HeadId]) -> torch.Tensor:
        """Each head's output zeroed at every position."""
        size = self.case.subject.anatomy.head_dim

        def zero(row: int, head: int, module: nn.Module, args: tuple) -> None:
            args[0][row, :, head * size : (head + 1) * size] = 0

        return self._passes(
            prompt, heads, lambda row, head: [self.attentions[head.layer].o_proj.register_forward_pre_hook(partial(zero, row, head.head))]
        )

    def replace_image_kv(self, prompt: Prompt, heads: Sequence[HeadId]) -> torch.Tensor:
        """Each head's image keys and values replaced by their means, for text queries."""
        return self._passes(prompt, heads, partial(self._replace, prompt))

    def _replace(self, prompt: Prompt, row: int, head: HeadId) -> list:
        one, seen = LlamaHead(self.case, prompt, head), {}
        attention = self.attentions[head.layer]

        def keep(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            seen[name] = output[row]

        def write(module: nn.Module, args: tuple) -> None:
            args[0][row, one.text, one.own] = one.replaced(seen["q_proj"], seen["k_proj"], seen["v_proj"])

        handles = [getattr(attention, name).register_forward_hook(partial(keep, name)) for name in ("q_proj", "k_proj", "v_proj")]
        return [*handles, attention.o_proj.register_forward_pre_hook(write)]

    def _passes(self, prompt: Prompt, heads: Sequence[HeadId], hooks) -> torch.Tensor:
        logits = []
        for start in range(0, len(heads), self.rows):
            chunk = heads[start : start + self.rows]
            handles = [handle for row, head in enumerate(chunk) for handle in hooks(row, head)]
            try:
                logits.append(self.forward(prompt, len(chunk)))
            finally:
                for handle in handles:
                    handle.remove()
        return torch.cat(logits)

    def image_mass(self, prompt: Prompt) -> torch.Tensor:
        """Share of attention ``[layer, head]`` that text queries give to the image, from ``q_proj`` and ``k_proj``."""
        anatomy, seen, masses, handles = self.case.subject.anatomy, {}, [], []

        def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            seen["query"] = output[0]

        def reduce(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            masses.append(text_mass(seen["query"], output[0], prompt, anatomy.n_heads, anatomy.n_kv_heads))

        try:
            for attention in self.attentions:
                handles += [attention.q_proj.register_forward_hook(keep), attention.k_proj.register_forward_hook(reduce)]
            self.forward(prompt)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(masses)


class OutputAttentions:
    """Plain transformers with eager attention and ``output_attentions=True``: every map of every layer, then reduced."""

    name = "output_attentions=True"

    def __init__(self, case: Case) -> None:
        self.model = own_tree(case.plain)
        self.model.set_attn_implementation({"text_config": "eager"})

    def image_mass(self, prompt: Prompt, queries: str = "text") -> torch.Tensor:
        """Share of attention ``[layer, head]`` that ``"text"`` or ``"all"`` queries give to the image."""
        with torch.inference_mode():
            maps = self.model(inputs_embeds=prompt.embeds, use_cache=False, logits_to_keep=1, output_attentions=True).attentions
            rows = prompt.text if queries == "text" else torch.arange(prompt.embeds.shape[1], device=prompt.embeds.device)
            return torch.stack([one[0][:, rows][..., prompt.image].sum(-1).mean(1) for one in maps])
