"""Slow, explicit versions of every intervention on the plain model, to compare the seam with.

Nothing here goes through the seam: plain hooks on modules, masks written out, tokens counted in Python loops.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import torch


def logits(subject, batch):
    """The model's logits on a batch, under whatever is active."""
    with torch.inference_mode():
        return subject.model(**batch.inputs).logits


def counted(batch):
    """The batch with explicit positions that leave left padding out, as ``generate`` counts them."""
    positions = (batch.valid.long().cumsum(1) - 1).clamp(min=0)
    return replace(batch, inputs={**batch.inputs, "position_ids": positions})


@contextmanager
def hooked(*hooks):
    """Plain hooks for a while: ``(module, "pre" or "post", function)``; functions get (args, kwargs) or the output."""
    handles = []
    for module, kind, function in hooks:
        if kind == "pre":
            handles.append(
                module.register_forward_pre_hook(lambda module, args, kwargs, f=function: f(args, kwargs), with_kwargs=True)
            )
        else:
            handles.append(module.register_forward_hook(lambda module, args, output, f=function: f(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def members(batch, positions, named=None):
    """Tokens of a group or at positions, ``[prompt, token]``, one by one."""
    mask = torch.zeros_like(batch.valid)
    for row in range(len(batch)):
        real = [column for column in range(batch.valid.shape[1]) if batch.valid[row, column]]
        image = [column for column in real if batch.image[row, column]]
        if isinstance(positions, tuple):
            chosen = [real[position] for position in positions]
        else:
            chosen = {
                "all": real,
                "image": image,
                "text": [column for column in real if column not in image],
                "question": [column for column in real if column > image[-1]],
                "preamble": [column for column in real if column < image[0]],
                "last": real[-1:],
                "bos": real[:1],
                **{name: [column for column in real if group[row, column]] for name, group in (named or {}).items()},
            }[positions]
        mask[row, chosen] = True
    return mask


def edit_heads(subject, layer, edit):
    """Hook for the heads' outputs of ``layer``: ``edit([batch, token, head, head_dim])`` changes them in place."""
    anatomy = subject.anatomy

    def hook(args, kwargs):
        heads = args[0].clone().unflatten(-1, (anatomy.n_heads, anatomy.head_dim))
        edit(heads)
        return (heads.flatten(-2), *args[1:]), kwargs

    return anatomy.output_projection(layer), "pre", hook


def edit_stream(subject, site, layer, edit):
    """Hook at a site of a layer: ``edit([batch, token, hidden])`` changes what is there in place."""
    anatomy = subject.anatomy
    if site == "head":
        return edit_heads(subject, layer, edit)
    if site == "residual":
        module = anatomy.norm if layer == anatomy.n_layers else anatomy.layers[layer]

        def enter(args, kwargs):
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            edit(hidden)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return module, "pre", enter

    def leave(output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        edit(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return (anatomy.attentions if site == "attention" else anatomy.mlps)[layer], "post", leave


def read_site(subject, batch, site, layer):
    """What a site of a layer holds in a plain pass, ``[prompt, token, ...]``."""
    kept = []
    with hooked(edit_stream(subject, site, layer, lambda tensor: kept.append(tensor.clone()))):
        logits(subject, batch)
    return kept[0]


def rotate(tensor, cosines, sines):
    """Rotary embedding of Llama, ``[batch, head, token, head_dim]``."""
    half = tensor.shape[-1] // 2
    turned = torch.cat([-tensor[..., half:], tensor[..., :half]], dim=-1)
    return tensor * cosines[:, None] + turned * sines[:, None]


def replace_image_kv(subject, batch, layer, head, keys, values, chosen):
    """Hooks that compute one head again on replaced image keys and values, for the queries ``chosen`` ``[prompt, token]``.

    ``keys``, ``values`` ``[head_dim]``, or ``[image token, head_dim]``.
    """
    anatomy, seen = subject.anatomy, {}
    attention = anatomy.attentions[layer]

    def remember(args, kwargs):
        seen.update(hidden=args[0] if args else kwargs["hidden_states"], rotary=kwargs["position_embeddings"])
        return args, kwargs

    def overwrite(heads):
        size, group = anatomy.head_dim, head // anatomy.kv_groups
        query = attention.q_proj(seen["hidden"]).unflatten(-1, (anatomy.n_heads, size)).transpose(1, 2)
        key = attention.k_proj(seen["hidden"]).unflatten(-1, (anatomy.n_kv_heads, size)).transpose(1, 2)
        value = attention.v_proj(seen["hidden"]).unflatten(-1, (anatomy.n_kv_heads, size)).transpose(1, 2)
        query, key = rotate(query, *seen["rotary"]), rotate(key, *seen["rotary"])
        for row in range(len(batch)):
            own_keys, own_values = key[row, group].clone(), value[row, group].clone()
            for number, column in enumerate(batch.image[row].nonzero()[:, 0].tolist()):
                own_keys[column] = keys if keys.ndim == 1 else keys[number]
                own_values[column] = values if values.ndim == 1 else values[number]
            for column in chosen[row].nonzero()[:, 0].tolist():
                visible = [key for key in range(column + 1) if batch.valid[row, key]]
                scores = own_keys[visible] @ query[row, head, column] * size**-0.5
                heads[row, column, head] = scores.softmax(0) @ own_values[visible]

    return (attention, "pre", remember), edit_heads(subject, layer, overwrite)


def causal(batch):
    """What a causal model sees, ``[prompt, 1, query, key]``."""
    n = batch.valid.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril() & batch.valid[:, None, None, :]


def mask_layers(subject, allowed_in):
    """Hooks that hand every decoder layer its own boolean mask; for sdpa."""
    return [
        (module, "pre", lambda args, kwargs, layer=layer: (args, {**kwargs, "attention_mask": allowed_in(layer)}))
        for layer, module in enumerate(subject.anatomy.layers)
    ]


def merge_by_hand(stream, compared, keep, sizes=None):
    """Bipartite merging, token by token.

    Parameters
    ----------
    stream, compared : lists of vectors

    Returns
    -------
    list of (place, vector, size), in order
    """
    sizes = [1.0] * len(stream) if sizes is None else sizes
    tokens = [
        (place, stream[place].double(), compared[place].double(), size) for place, size in enumerate(sizes)
    ]
    while len(tokens) > keep:
        even, odd = tokens[0::2], tokens[1::2]
        pairs = []
        for number, one in enumerate(even):
            cosines = [float(one[2] @ other[2] / (one[2].norm() * other[2].norm())) for other in odd]
            best = max(range(len(odd)), key=lambda j, cosines=cosines: (cosines[j], -j))
            pairs.append((cosines[best], number, best))
        pairs.sort(key=lambda pair: (-pair[0], pair[1]))
        chosen = pairs[: min(len(tokens) - keep, len(even))]
        gone, joined = set(), {number: [other] for number, other in enumerate(odd)}
        for _, number, target in chosen:
            gone.add(even[number][0])
            joined[target].append(even[number])
        merged = {}
        for cluster in joined.values():
            total = sum(token[3] for token in cluster)
            vector = sum(token[1] * token[3] for token in cluster) / total
            like = sum(token[2] * token[3] for token in cluster) / total
            merged[cluster[0][0]] = (cluster[0][0], vector, like, total)
        tokens = [merged.get(token[0], token) for token in tokens if token[0] not in gone]
    return [(place, vector, size) for place, vector, _, size in tokens]


def run_shortened(subject, batch, layer, shorten):
    """Logits of one unpadded prompt whose sequence is shortened before ``layer``, layer by layer by hand.

    ``shorten(hidden [token, hidden])`` gives (columns that are left, their new vectors, their sizes).
    """
    anatomy, n = subject.anatomy, batch.valid.shape[1]
    entered = read_site(subject, batch, "residual", layer)[0]
    columns, vectors, sizes = shorten(entered)
    hidden = torch.stack([vector.to(entered.dtype) for vector in vectors])[None]
    positions = torch.tensor([columns])
    cosines, sines = anatomy.language_model.rotary_emb(hidden, positions)
    allowed = torch.ones(len(columns), len(columns), dtype=torch.bool).tril()
    mask = torch.zeros(len(columns), len(columns)).masked_fill(~allowed, torch.finfo(torch.float32).min)
    mask = (mask + torch.tensor(sizes).log()[None, :])[None, None]
    with torch.inference_mode():
        for module in anatomy.layers[layer:]:
            hidden = module(hidden, attention_mask=mask, position_ids=positions, position_embeddings=(cosines, sines))
        assert n >= len(columns)
        return anatomy.head(anatomy.norm(hidden))[0]


def decode_again(subject, items, plan, steps, groups=None, **options):
    """Greedy decoding with no cache: the whole sequence again, alone, for every token."""
    outputs = []
    for number, item in enumerate(items):
        batch = subject.encode_items([item])
        ids, image = batch.inputs["input_ids"], batch.image
        for _ in range(steps):
            inputs = {**batch.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            whole = type(batch)(inputs, image, torch.ones_like(ids, dtype=torch.bool))
            named = None if groups is None else groups(whole)
            with subject.intervene(plan, whole, items=[number], groups=named, **options), torch.inference_mode():
                scores = subject.model(**inputs, use_cache=False).logits[:, -1:].clone()
                scores[..., subject.anatomy.image_token_id] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1)], dim=1)
            image = torch.nn.functional.pad(image, (0, 1))
        outputs.append(ids[0, -steps:].tolist())
    return outputs
