"""What tests of training share: a tiny student on disk, preferences, the weights of a folder."""

from __future__ import annotations

from datasets import Dataset, Features, Image, List, Value
from safetensors.torch import load_file

from vlm_core.tests.tiny import COLOURS, make_items, tiny_llava

TEMPLATE = (
    "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}{% for c in content %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}USER : {{ body(m['content']) }} ASSISTANT :"
    "{% else %}{% generation %} {{ body(m['content']) }} </s> {% endgeneration %}{% endif %}{% endfor %}"
)


def save_student(folder, seed: int = 0, layers: int = 2):
    """A tiny checkpoint on disk."""
    model, processor = tiny_llava(layers=layers, chat_template=TEMPLATE, seed=seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def weights(folder):
    """The weights of a checkpoint, by name."""
    return load_file(folder / "model.safetensors")


def preferences(n: int) -> Dataset:
    """Pairs of one to three words about ``n`` questions: the right colour, and another."""
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Image()), "prompt": message, "chosen": message, "rejected": message})
    rows = []
    for i, item in enumerate(make_items(n)):
        other = next(colour for colour in list(COLOURS)[i % 3 :] if colour != item["answer"])
        chosen, rejected = ("dark " * (i % 3)) + item["answer"], ("big " * (i % 2)) + other
        one = {"prompt": ("user", item["prompt"]), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
        rows.append({"images": [item["image"]], **{name: [{"role": role, "content": text}] for name, (role, text) in one.items()}})
    return Dataset.from_list(rows, features=features)
