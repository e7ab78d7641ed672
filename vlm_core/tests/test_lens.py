"""Readings of the residual stream in words: the model's own at the end, and parts that sum to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf

from vlm_core import DirectLogits, HeadOutputs, LogitLens, Subject, SubjectError, ZeroHeads, observe
from vlm_core.observation import lens
from vlm_core.observation.lens import FrozenNorm
from vlm_core.observation.observing import observe_encoded
from vlm_core.subjects.embed import capture
from vlm_core.subjects.rows import forward_rows
from vlm_core.tests.family_models import IMAGE_TOKEN, TEXT, TINY, Tiny, _clip
from vlm_core.tests.tiny import make_items, tiny_subject

WORDS = ("red", "green", "question")


@pytest.fixture(scope="module")
def subject():
    """With gains other than 1 in its final norm: norming twice shows."""
    subject = tiny_subject()
    with torch.no_grad():
        subject.anatomy.norm.weight.copy_(torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.5)
    return subject


def own_states(subject, item):
    """The model's own logits ``[token, vocabulary]`` and residual stream before every layer and the final norm."""
    kept = []
    handles = [layer.register_forward_hook(lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out))
               for layer in subject.anatomy.layers]
    first = subject.anatomy.layers[0].register_forward_pre_hook(lambda m, args: kept.insert(0, args[0]))
    with torch.inference_mode():
        logits = subject.model(**subject.encode_items([item]).inputs).logits[0].float()
    for handle in (*handles, first):
        handle.remove()
    return logits, torch.stack(kept)[:, 0]


def test_the_last_layer_is_the_model_and_every_layer_is_normed_once(subject):
    items = make_items(4)
    seen = observe(subject, items, LogitLens(top=3, words=WORDS, full=True))
    tokens = [subject.continuation(word)[0] for word in WORDS]
    assert seen["index"].shape == (4, 4, 3) and seen["index"].dtype == np.int32
    for row, item in enumerate(items):
        logits, states = own_states(subject, item)
        with torch.inference_mode():
            states = states[:, -1]
            by_hand = states * states.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * subject.anatomy.norm.weight
            by_hand = by_hand @ subject.anatomy.head.weight.T
        torch.testing.assert_close(by_hand[-1], logits[-1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(seen["logits"][row], by_hand, rtol=1e-3, atol=1e-4)
        log_probabilities = by_hand.log_softmax(-1)
        order = by_hand.argsort(-1, descending=True)
        np.testing.assert_array_equal(seen["index"][row], order[:, :3])
        np.testing.assert_allclose(seen["logprob"][row], log_probabilities.gather(1, order[:, :3]), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(seen["word logprob"][row], log_probabilities[:, tokens], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(seen["rank"][row], order.argsort(-1)[:, tokens])
    assert (seen["rank"] == 0).any() or (seen["rank"] > 3).any()


def test_the_final_norm_is_applied_once(subject):
    """Trap 6: transformers' last hidden state is normed already. The lens's last row is the model; norming that state again is not."""
    (item,) = make_items(1)
    seen = torch.from_numpy(observe(subject, [item], LogitLens(words=WORDS, full=True))["logits"])[0]
    with torch.inference_mode():
        outputs = subject.model(**subject.encode_items([item]).inputs, output_hidden_states=True)
        last, logits = outputs.hidden_states[-1][0, -1], outputs.logits[0, -1]
        torch.testing.assert_close(subject.anatomy.head(last), logits, rtol=1e-4, atol=1e-4)
        twice = subject.anatomy.head(subject.anatomy.norm(last))
    torch.testing.assert_close(seen[-1], logits, rtol=1e-4, atol=1e-4)
    assert (twice - logits).abs().max() > 0.05 * logits.abs().max()


def test_a_lens_on_every_image_token_in_pieces(subject, monkeypatch):
    items = make_items(3)
    whole = observe(subject, items, LogitLens(layers=(1, 3), positions="image", top=2, words="candidates"))
    assert set(whole) == {"index", "logprob", "rank", "word logprob"}
    assert whole["index"].shape == (3, 2, 17, 2) and whole["rank"].shape == (3, 2, 17, 4)
    monkeypatch.setattr(lens, "_LOGITS_AT_ONCE", 5 * subject.anatomy.vocab_size)
    pieces = observe(subject, items, LogitLens(layers=(1, 3), positions="image", top=2, words="candidates"))
    for key in whole:
        np.testing.assert_allclose(pieces[key], whole[key], rtol=1e-4, atol=1e-5)
    full = observe(subject, items, LogitLens(positions="image", top=0, full=True))["logits"]
    np.testing.assert_array_equal(full.argmax(-1)[:, [1, 3]], whole["index"][..., 0])


def test_a_lens_pads_prompts_of_other_lengths(subject):
    items = make_items(3)
    seen = observe(subject, items, LogitLens(positions="question", top=1))
    lengths = [int((~subject.encode_items([item]).image[0]).sum()) for item in items]
    assert len(set(lengths)) == 2
    empty = (seen["index"] == -1)[:, 0, :, 0]
    assert empty[1].any() and not empty[0].any()
    np.testing.assert_array_equal(np.isnan(seen["logprob"])[:, 0, :, 0], empty)


def test_bad_lenses_are_refused(subject):
    with pytest.raises(ValueError, match="exceeds this model's vocabulary"):
        observe(subject, make_items(1), LogitLens(top=9999))
    with pytest.raises(ValueError, match="top of LogitLens must be 0 or more"):
        LogitLens(top=-1)
    with pytest.raises(ValueError, match="targets are 'answer', 'candidates' or a sequence of words"):
        observe(subject, make_items(1), DirectLogits("answers"))


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject"])
def test_direct_logits_sum_to_the_logit_and_are_what_each_part_wrote(request, fixture):
    subject, items = request.getfixturevalue(fixture), make_items(4)
    parts = observe(subject, items, DirectLogits("candidates"))
    outputs = observe(subject, items, HeadOutputs("last"))
    anatomy = subject.anatomy
    for row, item in enumerate(items):
        tokens = [subject.continuation(word)[0] for word in item["candidates"]]
        mlps, kept = [], []
        handles = [layer.mlp.register_forward_hook(lambda m, a, out: mlps.append(out[0, -1])) for layer in anatomy.layers]
        handles.append(anatomy.norm.register_forward_pre_hook(lambda m, args: kept.append(args[0][0, -1])))
        logits, states = own_states(subject, item)
        for handle in handles:
            handle.remove()
        np.testing.assert_allclose(total(parts)[row], logits[-1, tokens], rtol=1e-4, atol=1e-5)
        scale = float(kept[0].pow(2).mean().add(1e-6).rsqrt())
        directions = (anatomy.head.weight[tokens] * anatomy.norm.weight * scale).detach()
        np.testing.assert_allclose(parts["embedding"][row], directions @ states[0, -1], rtol=1e-3, atol=1e-5)
        for layer in range(3):
            np.testing.assert_allclose(parts["mlp"][row, layer], directions @ mlps[layer], rtol=1e-3, atol=1e-5)
            for head in range(4):
                weight = anatomy.output_projection(layer).weight[:, head * 8 : (head + 1) * 8].detach()
                wrote = directions @ (weight @ torch.from_numpy(outputs[row, layer, head]))
                np.testing.assert_allclose(parts["heads"][row, layer, head], wrote, rtol=1e-3, atol=1e-5)


def total(parts: dict[str, np.ndarray]) -> np.ndarray:
    return parts["heads"].sum((1, 2)) + parts["mlp"].sum(1) + parts["embedding"] + parts["bias"]


def test_direct_logits_follow_an_intervention(subject):
    items = make_items(2)
    parts = observe(subject, items, DirectLogits(), ZeroHeads([(1, 2)]))
    assert (parts["heads"][:, 1, 2] == 0).all() and (parts["heads"][:, 1, 1] != 0).all()
    for row, item in enumerate(items):
        batch = subject.encode_items([item])
        with torch.inference_mode(), subject.intervene(ZeroHeads([(1, 2)]), batch):
            logit = subject.model(**batch.inputs).logits[0, -1, subject.continuation(item["answer"])[0]]
        np.testing.assert_allclose(total(parts)[row, 0], logit, rtol=1e-4, atol=1e-5)


def granite() -> Tiny:
    """LLaVA around a Granite decoder, which scales whatever it adds to the residual stream."""

    def config():
        text = tf.GraniteConfig(**TEXT, residual_multiplier=0.3)
        return tf.LlavaConfig(vision_config=_clip(), text_config=text, image_token_id=IMAGE_TOKEN)

    return replace(TINY["llava"], config=config)


# Norms after the attention (Gemma, GLM), LayerNorm and parallel blocks (Aya), biases (OPT), capped logits (PaliGemma 2),
# gates (Mllama) and multipliers (Granite).
@pytest.mark.parametrize(
    "name",
    ["qwen2_vl", "qwen3_vl", "paligemma2", "gemma3", "glm4v", "aya_vision", "blip2_opt", "mllama", "internvl", "granite", "biased"],
)
def test_direct_logits_on_families(name):
    tiny = granite() if name == "granite" else TINY["glm4v" if name == "biased" else name]
    model, inputs = tiny.model(), tiny.prompts()
    if name == "biased":
        for layer in model.model.language_model.layers:
            layer.post_self_attn_layernorm = torch.nn.LayerNorm(32)
    subject, tokens = Subject(model, name=name), [7, 30]
    anatomy = subject.anatomy
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():
            # Gains of 1 and biases of 0 would hide a part that is left out.
            if "Norm" in type(module).__name__ or isinstance(module, torch.nn.Linear):
                for key, parameter in module.named_parameters(recurse=False):
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    subject.continuation = {"seven": (7,), "thirty": (30,)}.__getitem__
    mlps = {}
    handles = [
        mlp.register_forward_hook(lambda m, a, out, layer=layer: mlps.update({layer: out}))
        for layer, mlp in enumerate(anatomy.mlps)
    ]
    with torch.inference_mode():
        expected = model(**inputs, use_cache=False).logits[0, -1, tokens].float()
    for handle in handles:
        handle.remove()
    assert len(mlps) == anatomy.n_layers
    if anatomy.logit_softcap is not None:
        expected = anatomy.logit_softcap * torch.atanh(expected / anatomy.logit_softcap)
    with torch.inference_mode():
        encoded = capture(subject, inputs)
    seen = observe_encoded(subject, [{"id": "0"}], encoded, [DirectLogits(("seven", "thirty"))]).values[0]
    parts = {key: values.numpy() for key, values in seen.items()}
    scale = max(np.abs(parts["heads"]).max(), np.abs(parts["mlp"]).max(), 1.0)
    np.testing.assert_allclose(total(parts)[0], expected, rtol=1e-3, atol=1e-4 * scale)
    assert np.abs(parts["heads"]).min() > 0
    # What is left to each MLP must be what it wrote: then the heads' share is theirs.
    for layer in range(anatomy.n_layers):
        wrote = written_by_mlp(subject, layer, mlps[layer], tokens, encoded)
        np.testing.assert_allclose(parts["mlp"][0, layer], wrote, rtol=5e-3, atol=2e-4 * scale)


def written_by_mlp(subject, layer, output, tokens, encoded) -> np.ndarray:
    """Along final directions, by hand: the MLP's output as its layer adds it, through a norm or a gate of its own."""
    anatomy, kept = subject.anatomy, []
    block = anatomy.layers[layer]
    handle = anatomy.norm.register_forward_pre_hook(lambda m, args: kept.append(args[0][:, -1].clone()))
    forward_rows(subject, encoded, np.array([0]), [None], [0])
    handle.remove()
    with torch.inference_mode():
        output = (output[0] if isinstance(output, tuple) else output).reshape(-1, anatomy.hidden_size)[-1:]
        for name in ("post_feedforward_layernorm", "post_mlp_layernorm"):
            if hasattr(block, name):
                output = getattr(block, name).forward(output)
        if hasattr(block, "cross_attn_mlp_gate"):
            output = output * block.cross_attn_mlp_gate.tanh()
        output = output * getattr(block, "residual_multiplier", 1.0)
        # The frozen norm is linear up to its bias: the difference is what this much more in the stream adds.
        frozen = frozen_norm(anatomy.norm, kept[0])
        return (anatomy.head.weight[tokens] @ (frozen(output) - frozen(torch.zeros_like(output)))[0]).numpy()


def frozen_norm(norm, at):
    """The norm with its scale fixed at ``at``, from its definition."""
    centred = isinstance(norm, torch.nn.LayerNorm) or "Cohere" in type(norm).__name__
    bias = getattr(norm, "bias", None)
    gain = 1.0 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
    eps = next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name))

    def centre(values):
        return values - values.mean(-1, keepdim=True) if centred else values

    scale = centre(at).pow(2).mean(-1, keepdim=True).add(eps).rsqrt()
    return lambda values: centre(values) * scale * gain + (0 if bias is None else bias)


def test_a_norm_that_is_not_linear_at_its_scale_is_refused():
    class Cubed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, hidden):
            return self.weight * hidden**3

    frozen = FrozenNorm.of(Cubed(), 8)
    with pytest.raises(SubjectError, match="Cubed is off by"):
        frozen.scale(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))
