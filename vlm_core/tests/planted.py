"""A model with planted heads: exactly those can see the image, so that what names heads can be told whether it names the right ones.

``planted_subject(heads)``                    a LLaVA whose other heads see an image of zeros
``with_answers_the_image_raises(...)``        items whose answer every planted head raises
"""

from __future__ import annotations

import torch

from vlm_core import ReplaceImageKV, Subject
from vlm_core.tests.tiny import WORDS, tiny_llava

IMAGE_FIRST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}USER : {{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT : {{ m['content'][0]['text'] }} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def planted_subject(planted, seed=0):
    """A LLaVA in which exactly the ``planted`` heads can see the image.

    The residual stream falls into three parts that never mix: what the image writes, what text writes, and what planted heads write for
    the unembedding alone.  Planted heads read the image part; all other heads and the MLPs read and write the text part, where image
    tokens (which come first) hold zeros.
    """
    model, processor = tiny_llava(hidden=32, heads=4, layers=3, seed=seed, chat_template=IMAGE_FIRST)
    image, text, told = slice(0, 10), slice(10, 22), slice(22, 32)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, image] = 0
        model.get_input_embeddings().weight[:, told] = 0
        projected = model.model.multi_modal_projector.linear_2
        projected.weight[text.start :] = 0
        projected.bias[text.start :] = 0
        for index, layer in enumerate(model.model.language_model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for part in (image, told):
                attention.q_proj.weight[:, part] = 0
                mlp.gate_proj.weight[:, part] = 0
                mlp.up_proj.weight[:, part] = 0
                mlp.down_proj.weight[part] = 0
            for head in range(4):
                rows = slice(8 * head, 8 * head + 8)
                reads, writes = (image, told) if (index, head) in planted else (text, text)
                for part in (image, text, told):
                    if part != reads:
                        attention.k_proj.weight[rows, part] = 0
                        attention.v_proj.weight[rows, part] = 0
                    if part != writes:
                        attention.o_proj.weight[part, rows] = 0
    return Subject(model, processor, name="planted")


def next_token_logits(subject, item, intervention):
    """Logits of every word after the prompt, through the whole model."""
    batch = subject.encode_items([item])
    with subject.intervene(intervention, batch), torch.inference_mode():
        return subject.model(**batch.inputs).logits[0, -1]


def with_answers_the_image_raises(subject, items, planted, means):
    """Each item's answer is the word that every planted head alone raises most by seeing the image."""
    words = [word for word in WORDS if word not in (":", "?")]
    ids = subject.tokenizer.convert_tokens_to_ids(words)
    answered = []
    for item in items:
        full = next_token_logits(subject, item, None)
        raised = torch.stack([full - next_token_logits(subject, item, ReplaceImageKV([head], means)) for head in planted])
        best = int(raised.amin(0)[ids].argmax())
        answered.append({**item, "answer": words[best], "candidates": words})
    return answered
