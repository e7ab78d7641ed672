"""Interventions by hooks on the plain model of a family: what the seam is compared with."""

from __future__ import annotations

import torch

from vlm_core import Batch, Subject
from vlm_core.tests.conformance.models import logits_of, plain_model, subject_of
from vlm_core.tests.oracles import hooked, merge_by_hand


def zeroed_by_hooks(subject: Subject, heads, batch: Batch) -> torch.Tensor:
    """Logits with heads' slices of what enters the output projection set to zero."""
    size = subject.anatomy.head_dim

    def zero_slice(head):
        def hook(args, kwargs):
            hidden = args[0].clone()
            hidden[..., head * size : (head + 1) * size] = 0
            return (hidden, *args[1:]), kwargs

        return hook

    with hooked(*((subject.anatomy.output_projection(layer), "pre", zero_slice(head)) for layer, head in heads)):
        return logits_of(subject.model, batch)


def masked_by_hooks(model, anatomy, layers, queries: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits of an eager model whose masks lose the edges from ``queries`` ``[token]`` to the image.

    Where the keys are the image's alone (Mllama) no key is left, and the attention adds nothing. ``anatomy`` is that of another such
    model.
    """
    own = type(anatomy).of(model, "plain")

    def mask_image(args, kwargs):
        mask = kwargs["attention_mask"].expand(batch.image.shape[0], -1, -1, -1).clone()
        mask[:, :, queries[:, None] & batch.image[0]] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    def zero_queries(output):
        return (output[0].masked_fill(queries[:, None], 0.0), *output[1:])

    hooks = [
        (own.attentions[layer], "post", zero_queries) if layer in own.cross_layers else (own.attentions[layer], "pre", mask_image)
        for layer in layers
    ]
    with hooked(*hooks):
        return logits_of(model, batch)


def merged_by_hooks(name: str, layer: int, keep: int, proportional: bool, batch: Batch) -> torch.Tensor:
    """Logits of the plain model on one prompt whose image tokens become ``keep`` size-weighted means before ``layer``."""
    model = plain_model(name, "eager")
    own = type(subject_of(name).anatomy).of(model, name)
    n, image, left = batch.image.shape[1], batch.image[0].nonzero()[:, 0].tolist(), {}

    def shorten(args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if not left:
            stream = [hidden[0, column] for column in image]
            left.update({image[place]: (vector, size) for place, vector, size in merge_by_hand(stream, stream, keep)})
            assert sum(size for _, size in left.values()) == len(image)
            columns = [column for column in range(n) if column not in image or column in left]
            vectors = [left[column][0].to(hidden.dtype) if column in left else hidden[0, column] for column in columns]
            hidden = torch.stack(vectors)[None]
        columns = torch.tensor([column for column in range(n) if column not in image or column in left])
        kwargs["attention_mask"] = kwargs["attention_mask"][:, :, columns][:, :, :, columns]
        if proportional:
            sizes = torch.tensor([float(left[column][1]) if column in left else 1.0 for column in columns.tolist()])
            kwargs["attention_mask"] = kwargs["attention_mask"] + sizes.log()
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(table.index_select(-2, columns) for table in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].index_select(-1, columns)
        return (hidden, *args[1:]), kwargs

    with hooked(*((module, "pre", shorten) for module in own.layers[layer:])):
        return logits_of(model, batch)
