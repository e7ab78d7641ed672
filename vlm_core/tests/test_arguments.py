"""Arguments that cannot be meant end in one sentence, before anything runs, and leave the subject as it was."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image

import vlm_core.sweeps.sweep
from vlm_core import (
    Activations,
    At,
    AttentionEntropy,
    AttentionMass,
    Batch,
    DirectLogits,
    DropTokens,
    GaussianNoise,
    HeadDirections,
    HeadMeans,
    HiddenStates,
    ImageAttention,
    ImageKVMeans,
    KeyValues,
    KnockOut,
    LogitLens,
    MaskIoU,
    MeanHeads,
    MergeTokens,
    Patch,
    RedirectHeads,
    RelativeDistance,
    ReplaceImageKV,
    ReplaceTokens,
    ResampleHeads,
    SinkMass,
    Sinks,
    Steer,
    Subject,
    SubjectError,
    TopTokens,
    ZeroHeads,
    accuracy_table,
    attention_map,
    capture_activations,
    declare,
    describe,
    evaluate,
    find_sinks,
    image_kv_means,
    image_layouts,
    load_interventions,
    lora_targets,
    mean_token,
    observe,
    save_interventions,
    selfcheck,
    sweep,
    touches,
)
from vlm_core.families.anatomy import HeadId
from vlm_core.observation import observing
from vlm_core.seam import plan
from vlm_core.tests.oracles import logits
from vlm_core.tests.tiny import make_items, tiny_subject

CUT = ZeroHeads([(1, 1)])


@pytest.fixture(scope="module")
def plain(subject):
    """A batch, and the logits that the subject gives it before anything went wrong."""
    batch = subject.encode_items(make_items(2))
    return batch, logits(subject, batch)


def refused(call, kind, words, subject, plain):
    with pytest.raises(kind) as found:
        call()
    sentence = str(found.value)
    assert type(found.value) is kind and "\n" not in sentence
    for one in words if isinstance(words, tuple) else (words,):
        assert one in sentence
    batch, before = plain
    assert torch.equal(logits(subject, batch), before)


def changed(**fields):
    """Two items, the second with other fields; a field that is ``...`` is left out."""
    first, second = make_items(2)
    return [first, {name: value for name, value in {**second, **fields}.items() if value is not ...}]


PICTURE = Image.new("RGB", (16, 16))
NARROW = torch.ones(3, 4, 5)
SITES = {("mlp", 1): torch.ones(4, 5), ("head", 1): torch.ones(4, 4, 5), ("residual", 0): torch.ones(4, 5)}
OTHERS = Activations(SITES, torch.ones(4, dtype=torch.bool))
IMPOSSIBLE = [
    # what a model of 3 layers x 4 heads of 8 cannot do, and how it is said beside the intervention's label
    (ZeroHeads([(0, 1), (9, 2)]), ("names head L9.H2", "3 layers x 4 heads", "layers count from 0 to 2, heads from 0 to 3")),
    (ZeroHeads([(0, 4), *((1, head) for head in range(4))]), ("names head L0.H4", "heads from 0 to 3")),
    (ZeroHeads([(-1, 0)]), ("names head L-1.H0", "layers count from 0 to 2")),
    (ZeroHeads([(0, -1)]), ("names head L0.H-1", "heads from 0 to 3")),
    (ResampleHeads([(2, 7)], Activations({("head", 2): torch.ones(4, 4, 8)}, torch.ones(4, dtype=torch.bool))), ("names head L2.H7",)),
    (KnockOut("last", "image", (-1, 2)), ("names layer -1", "they count from 0 to 2")),
    (KnockOut("last", "image", (0, 3)), ("names layer 3", "they count from 0 to 2")),
    (KnockOut("last", "image", (1,), (4,)), ("names head 4", "heads from 0 to 3")),
    (Steer(4, torch.ones(32)), ("names layer 4", "they count from 0 to 3 (3 is what enters the final norm)")),
    (Patch("residual", 4, GaussianNoise(1.0)), ("names layer 4", "they count from 0 to 3 (3 is")),
    (Patch("mlp", 3, GaussianNoise(1.0)), ("names layer 3", "they count from 0 to 2")),
    (DropTokens(3, 0.5), ("names layer 3", "they count from 0 to 2")),
    (MergeTokens(3, 0.5), ("names layer 3", "they count from 0 to 2")),
    # sources of another width
    (RedirectHeads([(1, 1)], HeadDirections(NARROW)), ("directions of", "(3, 4, 5)", "4 heads of 8", "on the same subject")),
    (MeanHeads([(1, 1)], HeadMeans(NARROW)), ("means of", "(3, 4, 5)", "4 heads of 8")),
    (ReplaceImageKV([(1, 1)], ImageKVMeans(NARROW, NARROW)), ("means of", "(3, 4, 5)", "4 heads of 8")),
    (Steer(1, torch.ones(5)), ("vectors of shape (5,), this model has (32,)",)),
    (ReplaceTokens(torch.ones(5)), ("vectors of shape (5,), this model has (32,)",)),
    (ReplaceTokens(OTHERS), ("vectors of shape (5,), this model has (32,)",)),
    (Patch("mlp", 1, OTHERS), ("vectors of shape (5,), this model has (32,)",)),
    (ResampleHeads([(1, 1)], OTHERS), ("vectors of shape (4, 5), this model has (4, 8)",)),
    # token groups that no prompt has
    (KnockOut("last", "objekt", (1,)), ("no token group 'objekt'", "knows image, text")),
    (KnockOut("objekt", "image", (1,)), ("no token group 'objekt'", "knows image, text")),
    (ZeroHeads([(1, 1)], "objekt"), ("no token group 'objekt'", "knows image, text")),
    (Steer(1, torch.ones(32), positions="objekt"), ("no token group 'objekt'", "knows image, text")),
    (DropTokens(1, 0.5, tokens="objekt"), ("no token group 'objekt'", "knows image, text")),
]
SWEEPS = [
    # interventions
    (dict(interventions=CUT), TypeError, ("a mapping of labels to rows", "(ZeroHeads)", "also of one")),
    (dict(interventions="zero"), TypeError, "got 'zero' (str)"),
    (dict(interventions=None), TypeError, "got None (NoneType)"),
    (dict(interventions={"a": (CUT, (CUT,))}), TypeError, ("the intervention 'a'", "a flat tuple", "got a tuple with")),
    (dict(interventions={"a": [CUT]}), TypeError, ("the intervention 'a'", "(list)")),
    (dict(interventions={"a": "zero"}), TypeError, "got 'zero' (str)"),
    (dict(interventions={"a": ZeroHeads}), TypeError, "got the class ZeroHeads"),
    (dict(interventions=[None, "zero"]), TypeError, "intervention 1 of the list"),
    *((dict(interventions={"a": row}), ValueError, (row.describe(), *words)) for row, words in IMPOSSIBLE),
    # metrics
    (dict(metrics=[]), ValueError, "at least one of correct, logit"),
    (dict(metrics=None), ValueError, "at least one of correct, logit"),
    (dict(metrics="correct"), ValueError, ("the text 'correct'", "('correct',)")),
    (dict(metrics=[1]), ValueError, "unknown metrics [1]: choose from correct"),
    (dict(metrics=["logit", "logit"]), ValueError, "'logit' 2 times"),
    (dict(metrics=["candidate 99"]), ValueError, ("no 'candidate 99'", "more than 4 candidates", "'candidate 3'")),
    (dict(metrics=["candidate 4"]), ValueError, "no 'candidate 4'"),
    # numbers
    (dict(batch_rows=0), ValueError, "batch_rows must be 1 or more, got 0"),
    (dict(batch_rows=-1), ValueError, "batch_rows must be 1 or more, got -1"),
    (dict(batch_rows=1.5), ValueError, "batch_rows must be an integer, got 1.5"),
    (dict(assignments=[(-1, "a")]), ValueError, ("item -1", "there are 2 items")),
    (dict(assignments=[(2, "a")]), ValueError, ("item 2", "there are 2 items")),
    (dict(assignments=[(0.0, "a")]), ValueError, "item index must be an integer, got 0.0"),
    (dict(assignments=[0]), ValueError, "pairs (item index, label), got 0 among them"),
    (dict(assignments=[(0, "a", 1)]), ValueError, "pairs (item index, label), got (0, 'a', 1)"),
    (dict(assignments=["0a"]), ValueError, "pairs (item index, label), got '0a'"),
    (dict(assignments={0: "a"}), ValueError, "a list of pairs (item index, label)"),
    (dict(assignments=[(0, ["a"])]), ValueError, "not among the interventions"),
    # callables
    (dict(progress="yes"), TypeError, ("True, False, None or a callable", "'yes'")),
    (dict(progress=1), TypeError, "True, False, None or a callable"),
    (dict(groups="object"), TypeError, "groups must be a callable"),
    (dict(groups=lambda item, prompt: [1]), ValueError, "a mapping of names to one boolean per token"),
    (dict(executor="ray"), TypeError, ("executor must be None or an executor such as", "got 'ray' (str)")),
    (dict(store=3), TypeError, "store must be a directory's path"),
    # subjects
    (dict(subject=None), TypeError, "must be a Subject, a checkpoint's path or id, or a callable"),
    (dict(subject=torch.nn.Linear(2, 2)), TypeError, ("a bare Linear", "Subject(model, processor)")),
    (dict(subject=dict), TypeError, ("must give a Subject, got dict", "load_vlm")),
    (dict(subject=lambda: None), ValueError, ("cannot be pickled", "give the Subject itself")),
    # items
    (dict(items=None), ValueError, ("must be a sequence", "None (NoneType)")),
    (dict(items=make_items(1)[0]), ValueError, "got a mapping: put a single item into a list"),
    (dict(items=(item for item in ())), ValueError, "write list(...) of them"),
    (dict(items="abc"), ValueError, "got 'abc' (str)"),
    (dict(items=pd.DataFrame({"id": [1]})), ValueError, ".to_dict('records')"),
    (dict(items=[1]), ValueError, "a mapping or an object with the field"),
    (dict(items=changed(image=None)), ValueError, ("the image of item 'item-1'", "got None")),
    (dict(items=changed(image="a.png")), ValueError, ("got 'a.png'", "PIL.Image.open")),
    (dict(items=changed(image=np.zeros((4, 4, 3), np.uint8))), ValueError, ("got ndarray", "Image.fromarray")),
    (dict(items=changed(image=[PICTURE, None])), ValueError, "got a list with None"),
    (dict(items=changed(image=Image.new("RGB", (0, 3)))), ValueError, "has no pixels (its size is 0 x 3)"),
    (dict(items=changed(image=Image.new("I", (4, 4)))), ValueError, ("mode 'I'", "no fixed range", "'I;16'")),
    (dict(items=changed(image=Image.new("F", (4, 4)))), ValueError, ("mode 'F'", "scale its values to 0..255")),
    (dict(items=changed(image=[])), SubjectError, "give it at least one image"),
    (dict(items=changed(prompt=None)), ValueError, ("the prompt of item 'item-1' must be a str", "None")),
    *((dict(items=changed(prompt=empty)), ValueError, "the prompt of item 'item-1' is empty") for empty in ("", "  \n")),
    (dict(items=changed(task=None)), ValueError, "item 'item-1' has task None"),
    (dict(items=changed(prompt=3)), ValueError, ("the prompt of item 'item-1' must be a str", "3 (int)")),
    (dict(items=changed(id=None)), ValueError, "has id None"),
    (dict(items=changed(scene_id=None)), ValueError, "item 'item-1' has scene_id None"),
    (dict(items=changed(answer="purple")), ValueError, ("item 'item-1'", "'purple' is not among its candidates")),
    (dict(items=changed(answer=None)), ValueError, "the answer of item 'item-1' must be a str"),
    (dict(items=changed(candidates=[])), ValueError, "a list of at least one str, got [] (list)"),
    (dict(items=changed(candidates=None)), ValueError, "a list of at least one str, got None"),
    (dict(items=changed(candidates="red")), ValueError, "a list of at least one str, got 'red'"),
    (dict(items=changed(candidates=["red", None])), ValueError, ("must be strings", "None")),
    (dict(items=changed(candidates=["red", "red"])), ValueError, "names the candidate 'red' twice"),
    *((dict(items=changed(**{name: ...})), ValueError, f"has no field '{name}' (it has") for name in make_items(1)[0] if name != "id"),
]


@pytest.mark.parametrize(("arguments", "kind", "words"), SWEEPS)
def test_a_sweep_says_what_it_cannot_do(subject, plain, monkeypatch, arguments, kind, words):
    usual = {"subject": subject, "items": make_items(2), "interventions": {"a": CUT}}
    asked = {**usual, **arguments}
    if kind is not SubjectError and "groups" not in arguments:
        # Nothing has run by then: what would encode is not reached.
        monkeypatch.setattr(vlm_core.sweeps.sweep, "_measure", lambda *_: pytest.fail("a block was measured first"))
    refused(lambda: sweep(asked.pop("subject"), asked.pop("items"), asked.pop("interventions"), **asked), kind, words, subject, plain)


def test_a_lazy_sequence_of_items_is_looked_at_as_it_is_read(subject, plain):
    class Lazy:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return changed(image=None)[index]

    refused(lambda: sweep(subject, Lazy(), [None]), ValueError, "the image of item 'item-1'", subject, plain)
    refused(lambda: observe(subject, Lazy(), AttentionMass()), ValueError, "the image of item 'item-1'", subject, plain)


def test_the_text_of_a_dataset_is_looked_through_without_its_images(subject, plain, monkeypatch):
    items = changed(answer="purple")
    dataset = Dataset.from_list([{key: value for key, value in item.items() if key != "image"} for item in items])
    refused(lambda: sweep(subject, dataset, [None]), ValueError, "no column 'image'", subject, plain)
    monkeypatch.setattr(Dataset, "__getitem__", lambda *_: pytest.fail("a whole item was read"))
    refused(lambda: sweep(subject, dataset.add_column("image", [0, 0]), [None]), ValueError, "'purple' is not among", subject, plain)


def test_a_store_in_a_file_and_below_one(subject, plain, tmp_path):
    (tmp_path / "file").write_text("x")
    for store in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(lambda store=store: sweep(subject, make_items(1), [None], store=store), ValueError, "file' is a file", subject, plain)


def test_candidates_that_only_other_items_have_are_minus_infinity_in_every_block(subject, monkeypatch):
    monkeypatch.setattr(vlm_core.sweeps.sweep, "_BLOCK_ITEMS", 1)
    items = make_items(2)
    items[0] = {**items[0], "candidates": [items[0]["answer"], next(c for c in items[0]["candidates"] if c != items[0]["answer"])]}
    values = sweep(subject, items, [None], metrics=("candidate 3",))["value"].tolist()
    assert values[0] == -np.inf and np.isfinite(values[1])


BAD_SIZES = [
    (None, "sizes are None (NoneType)"),
    ("x", "sizes are 'x' (str)"),
    (3, "sizes are 3 (int)"),
    ([16], "the sizes of prompt 0 are 16"),
    ([(16, 16)], "an image of prompt 0 has the size 16"),
    ([[16]], "an image of prompt 0 has the size 16"),
    ([["ab"]], "an image of prompt 0 has the size 'ab'"),
    ([[(16, 16, 3)]], "the size (16, 16, 3)"),
    ([[("a", "b")]], "the size ('a', 'b')"),
    ([[(0, 16)]], "the size (0, 16)"),
    ([[(16, -16)]], "the size (16, -16)"),
    ([[(16.5, 3)]], "the size (16.5, 3)"),
]


def placed(subject, sizes, **changes):
    inputs = subject.encode([PICTURE], ["what ?"]).inputs
    given = {"family": subject.anatomy.family, "inputs": inputs, **changes}
    return image_layouts(given["family"], subject.model.config, subject.processor, given["inputs"], sizes)


CALLS = [
    # encode
    (lambda s: s.encode([], []), ValueError, "nothing to encode"),
    (lambda s: s.encode_items([]), ValueError, "nothing to encode"),
    (lambda s: s.encode([PICTURE], ["a", "b"]), ValueError, "1 images for 2 prompts"),
    (lambda s: s.encode(PICTURE, ["a"]), ValueError, ("images must be a list", "[image]")),
    (lambda s: s.encode([PICTURE] * 4, "what"), ValueError, ("prompts must be a list of str", "[text]")),
    (lambda s: s.encode([PICTURE], [None]), ValueError, ("prompts must be a list of str", "None")),
    (lambda s: s.encode([PICTURE] * 2, ["what ?", " "]), ValueError, "prompt 1 is empty"),
    (lambda s: observe(s, changed(prompt=""), AttentionMass()), ValueError, "the prompt of item 'item-1' is empty"),
    *((lambda s, sizes=sizes: placed(s, sizes), ValueError, ("such as [[(336, 224)]]", *words)) for sizes, *words in BAD_SIZES),
    (lambda s: placed(s, [[(16, 16)]] * 2), ValueError, "there are 1 prompts, but sizes of the images of 2"),
    (lambda s: placed(s, [[(16, 16)]], inputs=None), ValueError, "inputs must be what the processor gave"),
    (lambda s: placed(s, [[(16, 16)]], inputs={}), ValueError, "inputs must be what the processor gave"),
    (lambda s: placed(s, [[(16, 16)]], family="llava"), TypeError, "family must be a Family, got 'llava' (str)"),
    # heads
    (lambda s: HeadId("a", "b"), ValueError, ("a head's layer must be an integer", "'a' (str)")),
    (lambda s: HeadId(1, 1.0), ValueError, ("a head's number must be an integer", "1.0 (float)")),
    (lambda s: HeadId(True, 1), ValueError, ("a head's layer must be an integer", "True (bool)")),
    (lambda s: s.encode([None], ["what ?"]), ValueError, ("the image of the prompt 'what ?'", "got None")),
    (lambda s: s.encode([PICTURE] * 3, ["a"] * 3, "red"), ValueError, "answers must be a list of str"),
    (lambda s: s.encode([PICTURE], ["a"], [None]), ValueError, "answers must be a list of str"),
    (lambda s: s.encode([PICTURE], ["a"], padding_side="top"), ValueError, "'left' (for generate) or 'right', got 'top'"),
    (lambda s: s.continuation(None), ValueError, "an answer must be a str"),
    (lambda s: s.render(None), ValueError, "must be a list of str"),
    (lambda s: s.layout(None), ValueError, "must be a PIL image"),
    (lambda s: Subject(s.model).encode([PICTURE], ["a"]), SubjectError, ("has no processor", "Subject(model, processor)")),
    (lambda s: Subject(None), SubjectError, "no transformers model but a NoneType"),
    # observe
    (lambda s: observe(s, make_items(2), "attention_mass"), TypeError, ("an observer is a declaration such as", "'attention_mass' (str)")),
    (lambda s: observe(s, make_items(2), [AttentionMass(), "x"]), TypeError, "an observer is a declaration such as"),
    (lambda s: observe(s, make_items(2), AttentionMass), TypeError, "the class AttentionMass: make one"),
    (lambda s: observe(s, make_items(2), []), ValueError, "at least one observer"),
    (lambda s: observe(s, make_items(2)[0], AttentionMass()), ValueError, "got a mapping"),
    (lambda s: observe(s, changed(image=None), AttentionMass()), ValueError, "the image of item 'item-1'"),
    (lambda s: observe("x", make_items(2), AttentionMass()), TypeError, "must be a Subject, got 'x' (str): load it"),
    (lambda s: observe(s, make_items(2), AttentionMass(), [CUT]), TypeError, "intervention must be None, an intervention such as"),
    (lambda s: observe(s, make_items(2), AttentionMass(), ZeroHeads([(3, 0)])), ValueError, "outside this model's 3 layers"),
    (lambda s: observe(s, make_items(2), AttentionMass(), groups="x"), TypeError, "groups must be a callable"),
    (lambda s: observe(s, make_items(2), AttentionMass(queries="objekt")), ValueError, ("no token group 'objekt'", "knows image")),
    (lambda s: observe(s, make_items(2), AttentionMass(groups=("objekt",))), ValueError, ("no token group 'objekt'", "knows image")),
    (lambda s: AttentionMass(groups=()), ValueError, "token groups by name, at least one"),
    (lambda s: AttentionMass(groups=3), ValueError, "token groups by name, at least one, got 3"),
    (lambda s: AttentionEntropy(over=(1,)), ValueError, "token groups by name, at least one"),
    (lambda s: HiddenStates(positions=()), ValueError, "positions of HiddenStates must be at least one integer"),
    (lambda s: HiddenStates(positions=None), ValueError, "a token group or integers, got None"),
    (lambda s: observe(s, make_items(1), DirectLogits(3)), ValueError, "targets are 'answer', 'candidates' or a sequence of words"),
    (lambda s: attention_map(s, make_items(2)), ValueError, "a mapping or an object with the field"),
    (lambda s: find_sinks(s, None), ValueError, "items must be a sequence"),
    (lambda s: image_kv_means("x", make_items(1)), TypeError, "must be a Subject"),
    (lambda s: mean_token(s, None), ValueError, "items must be a sequence"),
    (lambda s: capture_activations(s, None, "mlp"), ValueError, "a mapping or an object with the field"),
    (lambda s: capture_activations("x", make_items(1)[0]), TypeError, "must be a Subject"),
    # everything else
    (lambda s: selfcheck("x"), TypeError, "must be a Subject"),
    (lambda s: lora_targets(s, [0]), TypeError, "pass subject.anatomy"),
    (lambda s: lora_targets(s.anatomy, []), ValueError, "at least one layer and one module"),
    (lambda s: lora_targets(s.anatomy, ["1"]), ValueError, "each of layers must be an integer"),
    (lambda s: declare("llava"), TypeError, "declared by a Family"),
    (lambda s: describe("zero"), TypeError, "an intervention such as"),
    (lambda s: touches([CUT], 3), TypeError, "an intervention such as"),
    (lambda s: Activations("x", "y"), ValueError, "a mapping of (site, layer) to tensors"),
    (lambda s: Activations({("mlp", 1): torch.ones(2, 2)}, torch.ones(2).bool(), {"o": "x"}), ValueError, "must be tensors"),
    (lambda s: GaussianNoise(None), ValueError, "scale of GaussianNoise must be a number"),
    (lambda s: evaluate(s, changed(prompt=None)), ValueError, "the prompt of item 'item-1'"),
    (lambda s: evaluate(s, make_items(2), plan=[CUT]), TypeError, "plan must be None, an intervention"),
    (lambda s: evaluate(s, make_items(2), mode="greedy", batch_rows=0), ValueError, "batch_rows must be 1 or more"),
    (lambda s: evaluate(s, make_items(2), mode="greedy", max_new_tokens=0), ValueError, "max_new_tokens must be 1 or more"),
    (lambda s: evaluate("x", make_items(2), mode="greedy"), TypeError, "must be a Subject"),
    (lambda s: evaluate(s, [], blind="grey"), ValueError, "blind must be None, 'mean' or 'swap'"),
    (lambda s: evaluate(s, changed(image=[PICTURE]), blind="mean"), ValueError, ("item 'item-1' has several images", "blind='swap'")),
    (lambda s: evaluate(s, make_items(1), out="."), ValueError, "is a directory: name the file"),
    (lambda s: accuracy_table(pd.DataFrame({"task": []})), ValueError, "without column 'cluster'"),
    (lambda s: accuracy_table(evaluate(s, make_items(2)), confidence=95), ValueError, ("between 0 and 1, got 95", "0.95")),
]


@pytest.mark.parametrize(("call", "kind", "words"), CALLS)
def test_what_cannot_be_meant_is_refused(subject, plain, call, kind, words):
    refused(lambda: call(tiny_subject() if words == "has no processor" else subject), kind, words, subject, plain)


RUNS = [
    (lambda s, b: s.intervene("zero", b), TypeError, "an intervention such as"),
    (lambda s, b: s.intervene((CUT, (CUT,)), b), TypeError, "a flat tuple"),
    (lambda s, b: s.intervene(CUT, b.inputs), TypeError, "batch must be what subject.encode(images, prompts) gives"),
    (lambda s, b: s.intervene(CUT, b, observers=AttentionMass()), TypeError, "write [observer]"),
    (lambda s, b: s.intervene(CUT, b, observers=["attention_mass"]), TypeError, "attention(view) or layer(view)"),
    (lambda s, b: s.intervene(CUT, b, observers=[AttentionMass]), TypeError, "the class AttentionMass"),
    (lambda s, b: s.intervene(CUT, b, items=["a", "b"]), ValueError, "an item's number must be an integer"),
    (lambda s, b: s.intervene(CUT, b, groups={"o": [1, 2]}), TypeError, "a mapping of names to BoolTensors"),
]


@pytest.mark.parametrize(("row", "words"), IMPOSSIBLE)
def test_an_impossible_intervention_is_named_on_entry(subject, plain, monkeypatch, row, words):
    def enter():
        with subject.intervene([None, (CUT, row)], plain[0]):
            pytest.fail("the run began")

    known = words if "no token group" in words[0] else (row.describe(), *words)
    refused(enter, ValueError, known, subject, plain)
    monkeypatch.setattr(observing, "encode_items", lambda *_, **__: pytest.fail("items were encoded first"))
    refused(lambda: observe(subject, make_items(2), AttentionMass(), row), ValueError, (row.describe(), *words), subject, plain)


UNSEEN = [
    (HiddenStates(layers=(0, 99)), ("HiddenStates names layer 99", "3 layers, counted from 0", "3 is what enters the final norm")),
    (HiddenStates(layers=(-1,)), "HiddenStates names layer -1"),
    (HiddenStates(positions=(0, 99)), ("HiddenStates names position 99, prompt 0 of the batch has", "unless they are -30 to 29")),
    (HiddenStates(positions=(-29,)), ("names position -29, prompt 1 of the batch has 28 tokens", "unless they are -28 to 27")),
    (HiddenStates(positions="objekt"), ("HiddenStates", "no token group 'objekt'", "knows image, text")),
    (HiddenStates(positions="objekt tokens"), "no token group 'objekt'"),
    (At(AttentionMass(), layers=(3,)), ("At(AttentionMass)", "no layer 3", "3 layers")),
    (At(AttentionMass(), heads=(4,)), ("At(AttentionMass)", "no head 4", "4 heads")),
    (At(AttentionMass(queries="objekt"), layers=(1,)), ("AttentionMass", "no token group 'objekt'")),
    (AttentionMass(queries="objekt"), ("AttentionMass", "no token group 'objekt'", "knows image, text")),
    (AttentionMass(groups=("image", "objekt")), ("AttentionMass", "no token group 'objekt'")),
    (AttentionEntropy(over="objekt"), ("AttentionEntropy", "no token group 'objekt'")),
    (TopTokens(2, "objekt"), ("TopTokens", "no token group 'objekt'")),
    (TopTokens(2, "last", "objekt"), ("TopTokens", "no token group 'objekt'")),
    (ImageAttention("objekt"), ("ImageAttention", "no token group 'objekt'")),
    (MaskIoU(), ("MaskIoU", "no token group 'object'")),
    (KeyValues("objekt"), ("KeyValues", "no token group 'objekt'")),
    (RelativeDistance("objekt"), ("RelativeDistance", "no token group 'objekt'")),
    (SinkMass("objekt", Sinks((1,), 2.0)), ("SinkMass", "no token group 'objekt'")),
    (SinkMass(sinks=Sinks((32,), 2.0)), ("SinkMass", "no dimension 32", "has 32")),
    (SinkMass(), ("SinkMass has no sinks yet", "find_sinks")),
]


@pytest.mark.parametrize(("observer", "words"), UNSEEN)
def test_an_observer_of_what_is_not_there_is_named_on_entry(subject, plain, observer, words):
    def enter():
        with subject.intervene(None, plain[0], observers=[AttentionMass(), observer]):
            pytest.fail("the run began")

    refused(enter, ValueError, words, subject, plain)


@pytest.mark.parametrize("observer", [HiddenStates(layers=(9,)), At(AttentionMass(), heads=(9,)), LogitLens(layers=(9,)), LogitLens(top=999)])
def test_an_observer_that_does_not_fit_is_refused_before_items_are_encoded(subject, plain, monkeypatch, observer):
    monkeypatch.setattr(observing, "encode_items", lambda *_, **__: pytest.fail("items were encoded first"))
    refused(lambda: observe(subject, make_items(2), [AttentionMass(), observer]), ValueError, "9", subject, plain)


@pytest.fixture
def half_shown(subject):
    """Two prompts of which the second has no image."""
    shown = subject.encode_items(make_items(2))
    text = subject.tokenizer.convert_tokens_to_ids("what")
    ids, image = shown.inputs["input_ids"].clone(), shown.image.clone()
    ids[1][image[1]] = text
    image[1] = False
    return Batch({"input_ids": ids, "attention_mask": shown.inputs["attention_mask"]}, image, shown.valid)


MEANS = torch.ones(3, 4, 8)
ON_IMAGE = [
    ReplaceImageKV([(1, 1)], ImageKVMeans(MEANS, MEANS)),
    KnockOut("last", "image", (1,)),
    KnockOut("image", "text", (1,)),
    DropTokens(1, 0.5),
    MergeTokens(1, 0.5),
    ReplaceTokens(torch.ones(32)),
    Steer(1, torch.ones(32), positions="image"),
    ZeroHeads([(1, 1)], "image"),
    Patch("mlp", 1, GaussianNoise(1.0), "image"),
]


@pytest.mark.parametrize("row", ON_IMAGE)
def test_an_intervention_on_the_image_needs_one(subject, plain, half_shown, row):
    def enter(rows):
        with subject.intervene(rows, half_shown):
            pass

    words = (row.describe(), "prompt 1 of the batch has none", "give that row None or what text has too")
    refused(lambda: enter([None, row]), ValueError, words, subject, plain)
    refused(lambda: enter([None, (CUT, row)]), ValueError, words, subject, plain)
    enter([row, None])
    enter([row, CUT])


@pytest.mark.parametrize(
    "row", [ReplaceImageKV([], ImageKVMeans(MEANS, MEANS)), DropTokens(1, 1.0), ZeroHeads([], "image"), KnockOut("last", "text", (1,)), CUT]
)
def test_what_is_not_done_to_an_image_needs_none(subject, half_shown, row):
    with subject.intervene(row, half_shown):
        pass


LOOKS = [ImageAttention(), MaskIoU("o"), KeyValues(), HiddenStates(positions="image"), HiddenStates(positions="image tokens"),
         TopTokens(among="image"), AttentionMass(queries="image"), At(ImageAttention(), layers=(1,))]  # fmt: skip


@pytest.mark.parametrize("observer", LOOKS)
def test_an_observer_of_the_image_needs_one(subject, plain, half_shown, observer):
    def enter(batch):
        with subject.intervene(None, batch, observers=[AttentionMass(), observer], groups={"o": batch.image}):
            pass

    name = type(observer.observer if isinstance(observer, At) else observer).__name__
    refused(lambda: enter(half_shown), ValueError, (f"{name} is about image tokens and prompt 1 of the batch has none",), subject, plain)
    enter(plain[0])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((MeanHeads([(1, 1)], HeadMeans(torch.ones(3, 4, 8))), MeanHeads([(1, 1)], HeadMeans(torch.zeros(3, 4, 8)))), "at most one MeanHeads"),
        ((DropTokens(1, 0.5), CUT, MergeTokens(1, 0.5)), "at most once per layer"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_before_anything_runs(subject, plain, monkeypatch, row, words):
    monkeypatch.setattr(vlm_core.sweeps.sweep, "_measure", lambda *_: pytest.fail("a block was measured first"))
    refused(lambda: sweep(subject, make_items(2), {"a": row}), ValueError, words, subject, plain)


def test_checking_a_row_builds_no_tensors(subject, monkeypatch):
    """A sweep of thousands of rows looks through all of them first: what only a batch needs is not computed for it."""
    monkeypatch.setattr(plan, "_effect", lambda *_: pytest.fail("the row was compiled"))
    for row in (CUT, (CUT, Steer(1, torch.ones(32))), MeanHeads([(1, 1)], HeadMeans(torch.ones(3, 4, 8))), KnockOut("last", "image", (1,))):
        plan.require_possible(row, subject.anatomy)


@pytest.mark.parametrize(("run", "kind", "words"), RUNS)
def test_a_run_says_what_it_does_not_take(subject, plain, run, kind, words):
    def enter():
        with run(subject, plain[0]):
            pytest.fail("the run began")

    refused(enter, kind, words, subject, plain)


@pytest.mark.parametrize("plan", [None, CUT, DropTokens(1, 0.5)])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, ("2 prompts entered the model as 4 sequences", "beam search", "num_return_sequences at 1")),
        ({"num_beams": 3, "num_return_sequences": 2}, ("as 6 sequences", "not possible")),
        ({"use_cache": False}, ("use_cache=False cannot generate", "leave the cache on")),
    ],
)
def test_generating_says_what_is_not_possible(subject, plain, plan, options, words):
    batch, _ = plain

    def generate(**more):
        with torch.inference_mode(), subject.intervene(plan, batch):
            return subject.model.generate(**batch.inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, **more)

    before = generate()
    refused(lambda: generate(**options), ValueError, words, subject, plain)
    assert torch.equal(generate(), before)


STORED = [
    ("{nope", "is no JSON"),
    ("\ufffe", "is no JSON"),
    ("[1]", "holds no interventions"),
    ('{"foo": 1}', "holds no interventions"),
    ('{"rows": [1]}', "holds no interventions"),
    ('{"version": 99, "row": null}', "is of version 99, this vlm_core reads version 1"),
    ('{"row": "ZeroHeads"}', "a stored row is null, a table with a 'kind' or a list of them"),
    ('{"row": [[]]}', "one flat list"),
    ('{"row": {"kind": "Foo"}}', "'Foo' is not an intervention: the known ones are DropTokens"),
    ('{"row": {"kind": ["a"]}}', "is not an intervention"),
    ('{"row": {"kind": "ZeroHeads", "hats": 3}}', "fields hats, which it does not take"),
    ('{"row": {"kind": "Steer", "layer": 1, "direction": {"kind": "Foo"}}}', "'Foo' is no source"),
    ('{"row": {"kind": "Steer", "layer": 1, "direction": {"kind": "Vector"}}}', "has no digest"),
    ('{"row": {"kind": "Patch", "site": "mlp", "layers": [1], "source": {"kind": "GaussianNoise"}}}', "scale of GaussianNoise must be"),
]


@pytest.mark.parametrize(("text", "words"), STORED)
def test_files_that_hold_no_interventions(tmp_path, text, words):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError) as found:
        load_interventions(tmp_path / "rows.json")
    assert words in str(found.value)


def test_interventions_are_missed_damaged_and_found(tmp_path):
    with pytest.raises(ValueError, match="there are no interventions at .*nowhere.json"):
        load_interventions(tmp_path / "nowhere.json")
    path, row = tmp_path / "row.json", Steer(1, torch.arange(32.0))
    save_interventions(path, row)
    assert load_interventions(path) == row
    assert json.loads(path.read_text())["version"] == 1
    tensors = path.with_suffix(".safetensors")
    tensors.write_bytes(b"xx")
    with pytest.raises(ValueError, match="the tensors in .*row.safetensors are damaged"):
        load_interventions(path)
    tensors.unlink()
    with pytest.raises(ValueError, match="keep the .safetensors file beside the JSON"):
        load_interventions(path)


def test_what_cannot_be_stored_leaves_no_file(tmp_path):
    wrong = [
        (tmp_path / "a.json", [CUT], TypeError, "a flat tuple"),
        (tmp_path / "a.json", {"x": "zero"}, TypeError, "the intervention 'x'"),
        (tmp_path / "a.json", {1: CUT}, TypeError, "labels must be texts"),
        (tmp_path / "a.safetensors", CUT, ValueError, "name a .json file"),
        (tmp_path / "none" / "a.json", CUT, ValueError, "there is no directory"),
    ]
    for path, rows, kind, words in wrong:
        with pytest.raises(kind, match=words):
            save_interventions(path, rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_are_scaled_not_cut_off(subject, mode):
    values = (np.arange(256, dtype=np.uint32).reshape(16, 16) * 257).astype(np.uint16)
    stored = values if mode == "I;16" else values.astype(">u2")
    deep = Image.frombytes(mode, (16, 16), stored.tobytes())
    shallow = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    seen, expected = (subject.encode([image], ["what ?"]).inputs["pixel_values"] for image in (deep, shallow))
    assert torch.equal(seen, expected)


def test_an_image_file_that_ends_early_is_named(subject, plain, tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:2000])
    refused(lambda: subject.encode([Image.open(tmp_path / "half.png")], ["what ?"]), ValueError, ("half.png", "again"), subject, plain)


def test_noise_that_a_model_lacks_a_layer_for_changes_nothing(subject, plain):
    row = Patch("mlp", [9], GaussianNoise(1.0))
    refused(lambda: sweep(subject, make_items(1), {"x": row}), ValueError, "a layer outside this model's 3 layers", subject, plain)
