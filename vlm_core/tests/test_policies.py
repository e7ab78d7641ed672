"""What holds for every policy: the protocol between a policy and the seam, and the properties all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from vlm_core import DropTokens, GaussianNoise, MergeTokens, ReplaceTokens, sweep
from vlm_core.interventions.policy import Choice, Policy, Ranked, Seen
from vlm_core.interventions.stored import load_interventions, save_interventions
from vlm_core.reduction import DivPrune, FastV, declared
from vlm_core.subjects.embed import encode_items
from vlm_core.subjects.rows import forward_rows
from vlm_core.tests.policy_states import drawn_gate
from vlm_core.tests.test_drop import N_IMAGE, step_by_step
from vlm_core.tests.test_seam import logits
from vlm_core.tests.tiny import make_items, tiny_llava

POLICIES = {**declared(), "gate": drawn_gate(32)}
EARLIEST = {name: 1 if policy.looks_back else 0 for name, policy in POLICIES.items()}


@dataclass(frozen=True, eq=False)
class Halves(Policy):
    """Keeps the first tokens; each of them carries half of itself and half of the last candidate, and stands for two."""

    name: ClassVar[str] = "halves"

    def choose(self, seen: Seen, keep: int) -> Choice:
        mix = torch.zeros(keep, len(seen))
        mix[range(keep), range(keep)] = 0.5
        mix[:, -1] += 0.5
        return Choice(torch.arange(keep), mix, torch.full((keep,), 2.0))


@dataclass(frozen=True, eq=False)
class Asks(Ranked):
    """Keeps what a test's list of scores says, and remembers what it saw."""

    name: ClassVar[str] = "asks"
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "grid"})
    saw: ClassVar[list[Seen]] = []

    def scores(self, seen: Seen) -> torch.Tensor:
        self.saw.append(seen)
        return -torch.arange(len(seen)).float()


def kept(run, batch, row):
    """Image tokens of a prompt that are left, counted among its image tokens."""
    first = int(batch.image[row].int().argmax())
    return (run.tokens.index[row][run.tokens.image[row] & run.tokens.valid[row]] - first).tolist()


def test_fastv_is_what_the_built_in_attention_policy_keeps(subject):
    items = make_items(4)
    batch = subject.encode_items(items)
    with subject.intervene(DropTokens(1, 0.3, "attention"), batch) as run:
        expected = logits(subject, batch)
        chosen = [kept(run, batch, row) for row in range(4)]
    with subject.intervene(DropTokens(1, 0.3, FastV()), batch) as run:
        torch.testing.assert_close(logits(subject, batch), expected, rtol=0, atol=0)
        assert [kept(run, batch, row) for row in range(4)] == chosen


def test_fastv_of_all_queries_by_hand(subject):
    """The mean over all queries and heads of the whole map, from the queries and keys that the model itself prints."""
    items = make_items(3)
    batch = subject.encode_items(items, padding_side="right")
    plain, _ = tiny_llava(attention="eager")
    plain.load_state_dict(subject.model.state_dict())
    with torch.inference_mode():
        maps = plain(**batch.inputs, output_attentions=True).attentions[1]
    with subject.intervene(DropTokens(2, 5 / N_IMAGE, FastV("all")), batch) as run:
        logits(subject, batch)
    for row in range(3):
        real = batch.valid[row]
        received = maps[row][:, real].mean((0, 1))[batch.image[row]]
        assert kept(run, batch, row) == received.argsort(descending=True)[:5].sort().values.tolist()


def test_what_stays_may_carry_what_goes(subject):
    """Against a plain pass from the layer on, on residual streams that were mixed by hand."""
    items = make_items(2)[:1]
    batch = subject.encode_items(items)
    streams = []
    handle = subject.anatomy.layers[1].register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    with subject.intervene(None, batch):
        logits(subject, batch)
    handle.remove()
    stream = streams[0].clone()
    at = batch.image[0].nonzero()[:, 0]
    entered = []
    handle = subject.anatomy.layers[1].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with subject.intervene(DropTokens(1, 4 / N_IMAGE, Halves()), batch) as run:
        logits(subject, batch)
    handle.remove()
    stays = torch.cat([(~batch.image[0]).nonzero()[:, 0], at[:4]]).sort().values
    expected = stream[0].clone()
    expected[at[:4]] = (stream[0][at[:4]] + stream[0][at[-1]]) / 2
    torch.testing.assert_close(entered[0][0], expected[stays], rtol=1e-5, atol=1e-6)
    assert run.tokens.index[0].tolist() == stays.tolist()


def test_sizes_weigh_in_attention_as_those_of_merging_do(subject):
    """A policy that merges the pair that one round of merging takes gives what merging gives."""
    items = make_items(2)[:1]
    batch = subject.encode_items(items)
    merge = MergeTokens(1, 16 / N_IMAGE)
    with subject.intervene(merge, batch) as run:
        expected = logits(subject, batch)
        left = kept(run, batch, 0)

    @dataclass(frozen=True, eq=False)
    class AsMerged(Policy):
        def choose(self, seen: Seen, keep: int) -> Choice:
            gone = (set(range(N_IMAGE)) - set(left)).pop()
            unit = torch.nn.functional.normalize(seen.hidden, dim=1)
            odd = range(1, N_IMAGE, 2)
            target = odd[int((unit[gone] @ unit[list(odd)].T).argmax())]
            mix = torch.eye(N_IMAGE)[left]
            mix[left.index(target), [gone, target]] = 0.5
            sizes = torch.ones(keep)
            sizes[left.index(target)] = 2
            return Choice(torch.tensor(left), mix, sizes)

        def describe(self) -> str:
            return "as merged"

    with subject.intervene(DropTokens(1, 16 / N_IMAGE, AsMerged()), batch):
        torch.testing.assert_close(logits(subject, batch), expected, rtol=1e-5, atol=1e-5)


def test_what_a_policy_sees(subject):
    """The stream, the question without its answer, places on the image, attention of the layer before: of its own prompt, whatever the padding."""
    items = make_items(2)
    alone = subject.encode([items[1]["image"]], [items[1]["prompt"]], answers=[items[1]["answer"]])
    both = subject.encode([one["image"] for one in items], [one["prompt"] for one in items], answers=[one["answer"] for one in items])
    seen = []
    for batch in (alone, both):
        Asks.saw.clear()
        with subject.intervene(DropTokens(1, 0.5, Asks()), batch):
            logits(subject, batch)
        seen.append(Asks.saw[-1])
    asked = len(subject.encode_items([items[1]]).inputs["input_ids"][0])
    for one in seen:
        assert len(one) == one.n_started == N_IMAGE and one.layer == 1
        assert one.outside().row.tolist() == [-1, *(place // 4 for place in range(16))]  # a class token, then the patches
        assert one.outside().column.tolist() == [-1, *(place % 4 for place in range(16))]
        assert one.attention("question").shape[0] == len(one.question)
        whole = one.before.probabilities(one.before.tokens.last[:, None])[0, :, 0].mean(0)
        torch.testing.assert_close(one.attention()[0], whole[one.candidates], rtol=1e-5, atol=1e-7)
        assert int(one.question[-1]) - int(one.candidates[0]) + 1 <= asked
    for name in ("hidden", "asked"):
        torch.testing.assert_close(getattr(seen[0], name), getattr(seen[1], name), rtol=1e-4, atol=1e-5)
    # Padding turns keys by as much as it moves them: their products are what they were.
    products = [one.keys @ one.keys.T for one in seen]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-3)
    for queries in ("last", "question", "all", "image"):
        torch.testing.assert_close(seen[0].attention(queries), seen[1].attention(queries), rtol=1e-4, atol=1e-6)


def test_what_was_not_asked_for_cannot_be_read(subject):
    batch = subject.encode_items(make_items(1))

    @dataclass(frozen=True, eq=False)
    class Curious(Ranked):
        asks: str = "attention"

        def scores(self, seen: Seen) -> torch.Tensor:
            return seen.attention()[0] if self.asks == "attention" else seen.outside().row

        def describe(self) -> str:
            return "curious"

    for asks, sentence in (("attention", "a policy says in 'reads' what it asks for"), ("grid", "nothing is known of the places")):
        with pytest.raises(ValueError, match=sentence), subject.intervene(DropTokens(1, 0.5, Curious(asks)), batch):
            logits(subject, batch)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (Choice(torch.tensor([2, 1])), "ascending"),
        (Choice(torch.tensor([1, 1])), "ascending"),
        (Choice(torch.tensor([16, 17])), "ascending"),
        (Choice(torch.arange(8), mix=torch.ones(2, 3)), "mix of shape"),
        (Choice(torch.arange(8), sizes=torch.ones(3)), "sizes of shape"),
        (Choice(torch.arange(7)), "was asked for 8 of 17 tokens and kept 7"),
    ],
    ids=["order", "twice", "beyond", "mix", "sizes", "number"],
)
def test_an_answer_that_does_not_fit_is_refused(subject, choice, sentence):
    batch = subject.encode_items(make_items(1))

    @dataclass(frozen=True, eq=False)
    class Wrong(Policy):
        answer: str

        def choose(self, seen: Seen, keep: int) -> Choice:
            return choice

        def describe(self) -> str:
            return "wrong"

    with pytest.raises(ValueError, match=sentence), subject.intervene(DropTokens(1, 0.5, Wrong(repr(choice))), batch):
        logits(subject, batch)


def test_rows_of_one_prompt_whose_embeddings_differ_are_asked_about_apart(subject):
    """One of them had some of its image tokens replaced before: what one row keeps does not depend on the other."""
    (encoded,) = encode_items(subject, make_items(1))
    spot = tuple(range(2, 10))
    plain = DropTokens(0, 0.3, DivPrune())
    edited = (ReplaceTokens(GaussianNoise(3.0, 0), spot), plain)

    def kept_by(*rows):
        _, run = forward_rows(subject, [encoded], [0] * len(rows), list(rows), [0])
        tokens = run.tokens
        return [tokens.index[element][tokens.image[element] & tokens.valid[element]].tolist() for element in run.elements]

    ((alone_edited,), (alone_plain,)) = kept_by(edited), kept_by(plain)
    assert alone_edited != alone_plain
    assert kept_by(edited, plain) == [alone_edited, alone_plain] and kept_by(plain, edited) == [alone_plain, alone_edited]


def test_a_policy_that_looks_back_cannot_come_first():
    with pytest.raises(ValueError, match="use layer >= 1"):
        DropTokens(0, 0.5, FastV())
    assert DropTokens(0, 1.0, FastV()).keep == 1.0


# -- every policy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_it_keeps_as_many_image_tokens_as_asked_and_all_text(subject, name):
    batch = subject.encode_items(make_items(5))
    for layer in (EARLIEST[name], 2):
        for keep in (0.1, 0.5, 0.9):
            drop = DropTokens(layer, keep, POLICIES[name])
            with subject.intervene(drop, batch) as run:
                logits(subject, batch)
            text = (run.tokens.valid & ~run.tokens.image).sum(1)
            assert text.tolist() == (batch.valid & ~batch.image).sum(1).tolist()
            left = (run.tokens.valid & run.tokens.image).sum(1).tolist()
            if POLICIES[name].exact:
                assert left == [drop.count(N_IMAGE)] * 5
            else:
                assert all(0 < one <= N_IMAGE for one in left)


@pytest.mark.parametrize("name", POLICIES)
def test_keeping_everything_is_the_identity(subject, name):
    batch = subject.encode_items(make_items(3))
    plain = logits(subject, batch)
    with subject.intervene(DropTokens(EARLIEST[name], 1.0, POLICIES[name]), batch):
        assert torch.equal(logits(subject, batch), plain)


@pytest.mark.parametrize("name", POLICIES)
def test_it_goes_to_a_file_and_back(tmp_path, name):
    row = DropTokens(1, 0.25, POLICIES[name])
    save_interventions(tmp_path / "row.json", row)
    again = load_interventions(tmp_path / "row.json")
    assert again == row and hash(again) == hash(row) and again.describe() == row.describe()


@pytest.mark.parametrize("name", POLICIES)
def test_a_sweep_gives_what_each_item_gives_alone(subject, name):
    """Batches, shared trunks and resumed layers change nothing; a neighbour in the batch neither."""
    items = make_items(4)
    rows = {f"{layer}/{keep}": DropTokens(layer, keep, POLICIES[name]) for layer in (1, 2) for keep in (0.2, 0.5)}
    table = sweep(subject, items, {"none": None, **rows}, metrics=("margin",)).set_index(["item", "intervention"])["value"]
    for item in items:
        for label, row in rows.items():
            alone = sweep(subject, [item], {label: row}, metrics=("margin",))["value"][0]
            assert table[item["id"], label] == pytest.approx(alone, rel=1e-4, abs=1e-4)
    assert len(np.unique(table.round(6))) > len(items)


@pytest.mark.parametrize("name", POLICIES)
def test_generating_goes_on_from_the_shorter_cache(subject, name):
    items = make_items(2)
    row = DropTokens(1, 0.4, POLICIES[name])
    batch = subject.encode_items(items)
    numbers = list(range(len(items)))
    with subject.intervene(row, batch, items=numbers), torch.inference_mode():
        tokens = subject.model.generate(
            **batch.inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, suppress_tokens=[subject.anatomy.image_token_id]
        )
    assert tokens[:, -4:].tolist() == step_by_step(subject, items, row, 4)
