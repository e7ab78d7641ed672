"""The row engine equals the whole model, on every path that a row can take."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import Batch, SubjectError
from vlm_core.interventions import DropTokens, GaussianNoise, KnockOut, MergeTokens, Patch, ReplaceImageKV, Steer, ZeroHeads
from vlm_core.subjects.embed import capture
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.sweeps.budget import Budget
from vlm_core.sweeps.engine import RowJob, run_rows
from vlm_core.tests.conformance.claims import conforms
from vlm_core.tests.conformance.models import batch_of, close, image_heads, lengthened, logits_of, logits_under, some_means, subject_of
from vlm_core.tests.family_models import TINY


def row_interventions(anatomy) -> list:
    rows = [
        None,
        ZeroHeads([(1, 0), (3, 2)]),
        ReplaceImageKV(image_heads(anatomy), some_means(anatomy)),
        KnockOut("last", "image", anatomy.image_layers[-2:]),
    ]
    rows += [Steer(1, torch.ones(anatomy.hidden_size)), Patch("residual", (3,), GaussianNoise(1.0, seed=0), "text")]
    if "drop" in anatomy.capabilities:
        rows += [DropTokens(2, 0.5), DropTokens(2, 0.5, "attention"), DropTokens(3, 0.0), MergeTokens(2, 0.5)]
    return rows


@conforms("rows")
def test_rows(name):
    subject, batch = subject_of(name), batch_of(name)
    rows = row_interventions(subject.anatomy)
    with torch.inference_mode():
        sequences = capture(subject, batch.inputs)
    n = len(sequences[0])
    where = (np.arange(len(rows)), np.full(len(rows), n - 1))
    hidden, _ = forward_rows(subject, sequences, np.zeros(len(rows), dtype=int), rows, [0], where)
    seen = read_logits(subject, hidden)
    plain = logits_of(subject.model, batch)[0, -1]
    for row, intervention in enumerate(rows):
        expected = logits_under(subject, intervention, batch)[0, -1]
        close(seen[row], expected, str(intervention))
        assert (intervention is None) == torch.equal(expected, plain)


def refuse(needed: str):
    """What asks for a capability, by itself."""
    return lambda subject, batch: subject.anatomy.require(needed)


def run_on_paths(name: str, interventions: list) -> tuple[torch.Tensor, set[str]]:
    """Last logits of one row per intervention from the engine, and the paths that the rows took."""
    subject, batch = subject_of(name), batch_of(name)
    with torch.inference_mode():
        (sequence,) = capture(subject, batch.inputs)
    jobs = [RowJob(0, (), intervention, (len(sequence) - 1,)) for intervention in interventions]
    seen = torch.zeros(len(jobs), subject.anatomy.hidden_size)

    def keep(rows, hidden):
        seen[list(rows)] = hidden

    counts = run_rows(subject, [sequence], jobs, [0], keep, Budget.of(subject))
    return read_logits(subject, seen), set(counts.paths)


@conforms("resume", "resume", refuse("resume"))
def test_resume(name):
    subject, batch = subject_of(name), batch_of(name)
    rows = [ZeroHeads([(2, 0)]), ZeroHeads([(2, 1), (3, 2)]), (ZeroHeads([(3, 0)]), Steer(2, torch.ones(32)))]
    seen, paths = run_on_paths(name, rows)
    assert paths == {"resume"}
    for row, intervention in enumerate(rows):
        close(seen[row], logits_under(subject, intervention, batch)[0, -1], str(intervention))


def no_prefix(name: str) -> str | None:
    """Why no part of the prompt is there to share; who asks for it is told."""
    anatomy = subject_of(name).anatomy
    if anatomy.family.causal_prompt:
        return None
    with pytest.raises(ValueError, match="lacks 'shared_prefix': its prompt attends to itself both ways"):
        anatomy.require("shared_prefix")
    return anatomy.family.refusals["shared_prefix"]


@conforms("shared prefix", "shared_prefix", refuse("shared_prefix"), unavailable=no_prefix)
def test_shared_prefix(name):
    subject, batch = subject_of(name), batch_of(name)
    means = some_means(subject.anatomy)
    rows = [
        ReplaceImageKV([(0, 1), (3, 2)], means, queries="question"),
        KnockOut("question", "image", (1, 2)),
        KnockOut("last", "preamble", (2, 3)) if name in WITH_PREAMBLE else KnockOut("last", "image", (2, 3)),
        ZeroHeads([(1, 1), (2, 3)], queries="question"),
    ]
    seen, paths = run_on_paths(name, rows)
    assert paths == {"shared prefix"}
    for row, intervention in enumerate(rows):
        close(seen[row], logits_under(subject, intervention, batch)[0, -1], str(intervention))


WITH_PREAMBLE = tuple(name for name, tiny in TINY.items() if tiny.before)


@conforms("appended")
def test_appended_tokens(name):
    subject, batch = subject_of(name), batch_of(name)
    tokens = (17, 18, 19)
    longer = lengthened(name, batch, torch.tensor([tokens]))
    with torch.inference_mode():
        extended = capture(subject, batch.inputs)[0].extended(subject, tokens)
    n = len(extended)
    hidden, _ = forward_rows(
        subject, [extended], np.array([0]), [None], [0], (np.zeros(3, dtype=int), np.arange(n - 3, n))
    )
    close(read_logits(subject, hidden), logits_of(subject.model, longer)[0, -3:])


def one_image_only(name: str) -> str | None:
    subject = subject_of(name)
    if subject.anatomy.family.max_images is None:
        return None
    with pytest.raises(SubjectError, match="takes 1 image per prompt, got 2 .* ask about them one by one"):
        subject.encode([["one image", "another"]], ["?"])
    return "it takes one image per prompt: ask about several one by one"


@conforms("images", unavailable=one_image_only)
def test_several_images(name):
    """Prompts with two images and one are captured together and measured as each alone."""
    subject = subject_of(name)
    counts, closings = (2, 1), ((12, 13), (12, 13, 14, 15, 16))
    batch = batch_of(name, counts=counts, after=closings)
    rows = [ReplaceImageKV(image_heads(subject.anatomy), some_means(subject.anatomy)), ZeroHeads([(1, 0)])]
    with torch.inference_mode():
        sequences = capture(subject, batch.inputs)
    assert [int(sequence.image.sum()) for sequence in sequences] == batch.image.sum(1).tolist()
    last = np.array([len(sequence) - 1 for sequence in sequences])
    hidden, _ = forward_rows(subject, sequences, np.arange(2), rows, [0, 1], (np.arange(2), last))
    for row, seen in enumerate(read_logits(subject, hidden)):
        alone = batch_of(name, counts=counts[row : row + 1], after=closings[row : row + 1], start=2 * row)
        close(seen, logits_under(subject, rows[row], alone)[0, -1], f"row {row}")
    expected = logits_under(subject, rows, batch)
    other = dict(batch.inputs)
    other["pixel_values"] = batch.inputs["pixel_values"].clone()
    flat = other["pixel_values"].flatten(0, 1) if name in NESTED else other["pixel_values"]
    flat[len(flat) // 3 if name not in NESTED else 1] += 3.0
    changed = logits_under(subject, rows, Batch(other, batch.image, batch.valid))
    assert not torch.allclose(changed[0, last[0]], expected[0, last[0]])
    close(changed[1, last[1]], expected[1, last[1]], "the second prompt sees the first one's second image")


NESTED = ("idefics2", "idefics3", "smolvlm", "mllama")
