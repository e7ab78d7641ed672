"""The data card, written from what is really built: ``python -m probes.card`` rewrites ``CARD.md``."""

from __future__ import annotations

from pathlib import Path

from .baselines import baselines
from .dataset import BALANCE, SPLITS, assert_disjoint, build
from .scene import BACKGROUNDS, CELLS, COLORS, IMAGE_SIZE, SHAPES, SIZES
from .tasks import TASKS

PATH = Path(__file__).with_name("CARD.md")
N_PER_TASK = 240

TEXT = """# Data card: procedural probes

Written by `python -m probes.card` from the sets it describes ({n} items a task and split, seed 0).

## What it is
Small synthetic scenes with questions whose every answer is known by construction: images of {size} × {size} units, drawn on as many pixels
as a subject looks at ({size} a side at least), of two to seven objects
({shapes}; {colors}; {sizes}) on a {cells} × {cells} layout with jitter in place, size, angle and tint, anti-aliased, over backgrounds that are
{backgrounds}; a dot three to four units wide hides in a free cell. Nothing is downloaded and no person or real place appears.

## How it is made
A scene follows from `(split, seed, index)` alone, the same in every process. Each task puts its question to each scene and keeps it while the
quota of that answer is open, so answers are balanced by rejection (bound: no answer more than {balance} × the next; quotas make it exact up
to one item). Items of several tasks share a scene: `scene_id` is the cluster to resample. Every item carries the ids, boxes and masks of the
objects it is about, a paraphrase, and a counterfactual partner image in which one attribute is swapped and the answer differs.

Splits: {splits}. They draw from disjoint seed streams; that no picture is in two of them is checked by content hash when this card is
written and in the tests. `debug_set()` is a fixed set of 100 items over all tasks.

## Tasks and what can be had without looking
{table}

`chance` is one over the number of candidates, `majority` the task's most frequent answer, `blind` the most frequent answer given the prompt, both
learnt on `train` and scored on `confirmation`. Two-way questions (`binding`) and questions that name two of four answers (`relation`) can be
guessed half the time. Captions have one right and two wrong candidates that differ in one attribute.

## Intended use
Testing claims about how a vision-language model grounds language in images: head ablation, token dropping, distillation. A subject's accuracy
here says what it can do on these scenes and nothing about photographs.

## Known biases and limits
* Objects never overlap and always lie in one cell; colours are six saturated hues on grey; the language is a small fixed set of templates.
* Only one shape repeats in a scene, so counting is over one to four.
* An object's row and column are unambiguous; relations are never asked between objects in the same column (row).
* The dot lies on the background, never on an object.
* Scenes are laid out on {size} × {size}: more pixels draw the same scene more finely and hold nothing smaller.

## Licence
Apache-2.0, as the rest of the repository.
"""


def table(frame) -> str:
    """A Markdown table of `baselines` with the tasks' descriptions."""
    lines = ["| task | what is asked | items | answers | balance | chance | majority | blind |", "|---|---|---|---|---|---|---|---|"]
    for row in frame.itertuples():
        lines.append(
            f"| {row.task} | {TASKS[row.task].description} | {row.items} | {'open' if TASKS[row.task].answers is None else row.answers} | "
            f"{row.balance:.2f} | {row.chance:.2f} | {row.majority:.2f} | {row.blind:.2f} |"
        )
    return "\n".join(lines)


def write(path: Path = PATH) -> str:
    """Build the sets, check that they are disjoint, write the card and return its text."""
    sets = {split: build(split, n_per_task=N_PER_TASK) for split in ("train", "discovery", "confirmation")}
    assert_disjoint(sets.values())
    text = TEXT.format(
        n=N_PER_TASK, size=IMAGE_SIZE, cells=CELLS, balance=BALANCE, shapes=", ".join(SHAPES), colors=", ".join(COLORS),
        sizes=" and ".join(SIZES), backgrounds=", ".join(BACKGROUNDS), splits=", ".join(f"`{s}`" for s in SPLITS),
        table=table(baselines(sets["train"], sets["confirmation"])),
    )  # fmt: skip
    path.write_text(text)
    return text


if __name__ == "__main__":
    print(write())
