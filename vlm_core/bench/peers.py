"""The same work done with nnsight, TransformerLens and pyvene.

``open_peers(case)``     every peer that is installed and takes the subject; for each other one, the reason

Each peer gets the merged embeddings, unembeds the last token only, and is used as its own documentation has it. Where it shows projections,
a replaced head is computed by ``plain.LlamaHead``, as in the hooks. A peer has the methods of ``plain.PlainHooks``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

from vlm_core import HeadId
from vlm_core.bench.plain import LlamaHead, text_mass
from vlm_core.bench.subjects import Case, Prompt, own_tree

__all__ = ["PEERS", "open_peers"]

CALL = {"use_cache": False, "logits_to_keep": 1}


class NNsightPeer:
    """nnsight: a trace for each intervention, written with the modules' inputs and outputs."""

    distribution = "nnsight"
    supported = "0.8"

    def __init__(self, case: Case) -> None:
        from nnsight import NNsight

        self.case = case
        self.model = NNsight(own_tree(case.plain))
        self.layers = self.model.model.language_model.layers

    def forward(self, prompt: Prompt) -> torch.Tensor:
        """A trace that looks at nothing but the logits."""
        model = self.model
        with torch.inference_mode(), model.trace(inputs_embeds=prompt.embeds, **CALL):
            logits = model.output.logits.save()
        return logits[:, -1]

    def zero_heads(self, prompt: Prompt, heads: Sequence[HeadId]) -> torch.Tensor:
        """A head's columns of the output projection's input set to zero."""
        size = self.case.subject.anatomy.head_dim
        rows = []
        for head in heads:
            model, projection, own = self.model, self.layers[head.layer].self_attn.o_proj, slice(head.head * size, (head.head + 1) * size)
            with torch.inference_mode(), model.trace(inputs_embeds=prompt.embeds, **CALL):
                projection.input[:, :, own] = 0
                logits = model.output.logits.save()
            rows.append(logits[:, -1])
        return torch.cat(rows)

    def replace_image_kv(self, prompt: Prompt, heads: Sequence[HeadId]) -> torch.Tensor:
        """Projections read, the replaced head written into the output projection's input."""
        rows = []
        for head in heads:
            model, attention, one = self.model, self.layers[head.layer].self_attn, LlamaHead(self.case, prompt, head)
            with torch.inference_mode(), model.trace(inputs_embeds=prompt.embeds, **CALL):
                query = attention.q_proj.output[0]
                key = attention.k_proj.output[0]
                value = attention.v_proj.output[0]
                attention.o_proj.input[0, one.text, one.own] = one.replaced(query, key, value)
                logits = model.output.logits.save()
            rows.append(logits[:, -1])
        return torch.cat(rows)

    def image_mass(self, prompt: Prompt) -> torch.Tensor:
        """Projections of every layer read in one trace, reduced at once."""
        anatomy, model = self.case.subject.anatomy, self.model
        masses: list[torch.Tensor] = []
        with torch.inference_mode(), model.trace(inputs_embeds=prompt.embeds, **CALL):
            for layer in self.layers:
                query = layer.self_attn.q_proj.output[0]
                key = layer.self_attn.k_proj.output[0]
                masses.append(text_mass(query, key, prompt, anatomy.n_heads, anatomy.n_kv_heads))
        return torch.stack(masses)


class TransformerLensPeer:
    """TransformerLens's bridge: hooks at ``hook_z``, ``hook_rot_q``, ``hook_rot_k``, ``v.hook_out`` and ``hook_pattern``."""

    distribution = "transformer-lens"
    supported = "4"

    def __init__(self, case: Case) -> None:
        from transformer_lens.model_bridge.sources.transformers import boot

        self.case = case
        with TemporaryDirectory() as folder:
            # Beside the model it is given, the bridge wants a name under which it finds a config and a processor.
            case.plain.config.save_pretrained(folder)
            case.subject.processor.save_pretrained(folder)
            # It renames parameters and switches attention to its own: it gets a copy of everything.
            # Where it cannot load a processor it installs torchvision with pip, and torch with it: not from here.
            with patch("transformer_lens.model_bridge.sources.transformers.helpers._ensure_torchvision", return_value=False):
                self.model = boot(folder, hf_model=copy.deepcopy(case.plain), device=str(case.subject.device), dtype=case.dtype)

    def forward(self, prompt: Prompt) -> torch.Tensor:
        """The bridge without a hook."""
        return self._run(prompt, [])

    def _run(self, prompt: Prompt, hooks: list) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.run_with_hooks(prompt.embeds, fwd_hooks=hooks, return_type="logits", **CALL)[:, -1]

    def zero_heads(self, prompt: Prompt, heads: Sequence[HeadId]) -> torch.Tensor:
        """A head of ``hook_z`` set to zero."""

        def zero(number: int, z: torch.Tensor, hook) -> torch.Tensor:
            z[:, :, number] = 0
            return z

        return torch.cat([self._run(prompt, [(f"blocks.{head.layer}.attn.hook_z", partial(zero, head.head))]) for head in heads])

    def replace_image_kv(self, prompt: Prompt, heads: Sequence[HeadId]) -> torch.Tensor:
        """Rotated queries and keys and the values kept, the replaced head written into ``hook_z``."""
        return torch.cat([self._run(prompt, self._replacing(prompt, head)) for head in heads])

    def _replacing(self, prompt: Prompt, head: HeadId) -> list:
        one, seen = LlamaHead(self.case, prompt, head), {}
        shared = head.head // self.case.subject.anatomy.kv_groups

        def keep(name: str, value: torch.Tensor, hook) -> None:
            seen[name] = value[0]

        def write(z: torch.Tensor, hook) -> torch.Tensor:
            z[0, one.text, head.head] = one.attend(seen["query"][one.text, head.head], seen["key"][:, shared], seen["value"][:, shared])
            return z

        place = f"blocks.{head.layer}.attn"
        kept = [("hook_rot_q", "query"), ("hook_rot_k", "key"), ("hook_v", "value")]
        return [*((f"{place}.{hook}", partial(keep, name)) for hook, name in kept), (f"{place}.hook_z", write)]

    def image_mass(self, prompt: Prompt) -> torch.Tensor:
        """``hook_pattern`` of every layer, reduced at once."""
        masses: list[torch.Tensor] = []

        def reduce(pattern: torch.Tensor, hook) -> None:
            masses.append(pattern[0][:, prompt.text][..., prompt.image].sum(-1).mean(1))

        self._run(prompt, [(f"blocks.{layer}.attn.hook_pattern", reduce) for layer in range(self.case.subject.anatomy.n_layers)])
        return torch.stack(masses)


class PyvenePeer:
    """pyvene: functions at direct path strings (``model.language_model.layers[3].self_attn.o_proj.input``)."""

    distribution = "pyvene"
    supported = "0.1"

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = own_tree(case.plain)
        self._run(case.prompt(0), [(f"{self._place(0)}.o_proj.input", lambda base, source: base)])

    @staticmethod
    def _place(layer: int) -> str:
        return f"model.language_model.layers[{layer}].self_attn"

    def _run(self, prompt: Prompt, functions: list) -> torch.Tensor:
        import pyvene

        config = [{"component": component, "intervention": function} for component, function in functions]
        intervenable = pyvene.IntervenableModel(config, model=self.model)
        with torch.inference_mode():
            _, outputs = intervenable({"inputs_embeds": prompt.embeds, **CALL})
        return outputs.logits[:, -1]

    def forward(self, prompt: Prompt) -> torch.Tensor:
        """A function that gives back nothing, so that pyvene is in the way at all."""
        return self._run(prompt, [(f"{self._place(0)}.o_proj.input", lambda base, source: None)])

    def zero_heads(self, prompt: Prompt, heads: Sequence[HeadId]) -> torch.Tensor:
        """A head's columns of the output projection's input set to zero."""
        return torch.cat([self._run(prompt, [self._zeroing(head)]) for head in heads])

    def _zeroing(self, head: HeadId) -> tuple:
        size = self.case.subject.anatomy.head_dim
        own = slice(head.head * size, (head.head + 1) * size)

        def zero(base: torch.Tensor, source) -> torch.Tensor:
            base[:, :, own] = 0
            return base

        return f"{self._place(head.layer)}.o_proj.input", zero

    def replace_image_kv(self, prompt: Prompt, heads: Sequence[HeadId]) -> torch.Tensor:
        """Projections kept, the replaced head written into the output projection's input."""
        return torch.cat([self._run(prompt, self._replacing(prompt, head)) for head in heads])

    def _replacing(self, prompt: Prompt, head: HeadId) -> list:
        one, seen = LlamaHead(self.case, prompt, head), {}

        def keep(name: str):
            # pyvene takes functions only, no functools.partial; what gives back None changes nothing.
            return lambda base, source: seen.__setitem__(name, base[0])

        def write(base: torch.Tensor, source) -> torch.Tensor:
            base[0, one.text, one.own] = one.replaced(seen["q_proj"], seen["k_proj"], seen["v_proj"])
            return base

        place = self._place(head.layer)
        kept = [(f"{place}.{name}.output", keep(name)) for name in ("q_proj", "k_proj", "v_proj")]
        return [*kept, (f"{place}.o_proj.input", write)]

    def image_mass(self, prompt: Prompt) -> torch.Tensor:
        """Projections of every layer, reduced at once."""
        anatomy, seen, masses = self.case.subject.anatomy, {}, []

        def keep(base: torch.Tensor, source) -> None:
            seen["query"] = base[0]

        def reduce(base: torch.Tensor, source) -> None:
            masses.append(text_mass(seen["query"], base[0], prompt, anatomy.n_heads, anatomy.n_kv_heads))

        functions = []
        for layer in range(anatomy.n_layers):
            functions += [(f"{self._place(layer)}.q_proj.output", keep), (f"{self._place(layer)}.k_proj.output", reduce)]
        self._run(prompt, functions)
        return torch.stack(masses)


PEERS = {"nnsight": NNsightPeer, "TransformerLens": TransformerLensPeer, "pyvene": PyvenePeer}


def open_peers(case: Case, peers: dict | None = None) -> tuple[dict, dict[str, str]]:
    """The peers that take this subject, by name; and why each other one does not.

    Parameters
    ----------
    peers : dict of str to class, optional
        Default: ``PEERS``.
    """
    opened, missing = {}, {}
    for name, peer in (PEERS if peers is None else peers).items():
        try:
            found = version(peer.distribution)
        except PackageNotFoundError:
            missing[name] = f"{peer.distribution} is not installed (pip install vlm-claims[bench])"
            continue
        if not f"{found}.".startswith(f"{peer.supported}."):
            missing[name] = f"{peer.distribution} {found} is installed, the comparison is written for {peer.supported}"
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                opened[f"{name} {found}"] = peer(case)
            except Exception as error:  # whatever a peer raises on a subject is its reason, and the others are still compared
                missing[name] = (
                    f"{peer.distribution} {found} does not take this subject: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
                )
    return opened, missing
