"""The same work done with vlm_core, through its public interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from vlm_core import AttentionMass, HeadId, ReplaceImageKV, ZeroHeads, sweep
from vlm_core.bench.subjects import CANDIDATES, Case, Prompt

__all__ = ["Own"]

METRICS = ("logit", *(f"candidate {number}" for number in range(len(CANDIDATES))))


class Own:
    """vlm_core: one ``sweep`` for all interventions; ``Subject.intervene`` around a forward pass.

    A sweep starts from the item: image processing, vision tower, scoring and the table are part of it.
    """

    name = "vlm_core"

    def __init__(self, case: Case) -> None:
        self.case = case

    def replace_image_kv(self, prompt: Prompt, heads: Sequence[HeadId]) -> np.ndarray:
        """Values ``[intervention, 1 + candidate]`` as ``Case.values`` has them."""
        return self._sweep(prompt, {str(head): ReplaceImageKV([head], self.case.means, queries="text") for head in heads})

    def zero_heads(self, prompt: Prompt, heads: Sequence[HeadId]) -> np.ndarray:
        """Values ``[intervention, 1 + candidate]``."""
        return self._sweep(prompt, {str(head): ZeroHeads([head]) for head in heads})

    def _sweep(self, prompt: Prompt, interventions: dict) -> np.ndarray:
        table = sweep(self.case.subject, [prompt.item], interventions, metrics=METRICS)
        return table["value"].to_numpy(dtype=float).reshape(len(interventions), len(METRICS))

    def forward(self, prompt: Prompt, observers: Sequence = ()) -> torch.Tensor:
        """The model with the seam awake and nothing to do."""
        return self._observe(prompt, observers)[0]

    def image_mass(self, prompt: Prompt, queries: str = "text") -> torch.Tensor:
        """Share of attention ``[layer, head]`` that a group of queries gives to the image."""
        _, run = self._observe(prompt, [AttentionMass(queries=queries, groups=("image",))])
        return torch.cat([run.record(0, layer) for layer in range(self.case.subject.anatomy.n_layers)])[..., 0]

    def _observe(self, prompt: Prompt, observers: Sequence):
        subject = self.case.subject
        with torch.inference_mode(), subject.intervene(None, prompt.batch, observers=observers) as run:
            logits = subject.model(inputs_embeds=prompt.embeds, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits, run

    def widths(self, work: Callable[[], object]) -> dict[int, int]:
        """Tokens per matrix product of the decoder while ``work`` runs: ``{tokens: multiply-adds spent at that width}``."""
        found: dict[int, int] = {}

        def count(module: torch.nn.Linear, args: tuple) -> None:
            tokens = args[0].numel() // module.in_features
            found[tokens] = found.get(tokens, 0) + tokens * module.weight.numel()

        linear = [module for layer in self.case.subject.anatomy.layers for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        handles = [module.register_forward_pre_hook(count) for module in linear]
        try:
            work()
        finally:
            for handle in handles:
                handle.remove()
        return found
