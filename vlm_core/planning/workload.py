"""What a profile's suite makes a model do, as counted in a run, and what that is for another subject.

``Workload``                 one profile's counted work, with where it comes from; ``read_workload(file, profile)``
``Workload.flops(sizes)``    operations of the same suite on another subject, by part
``Check``                    what the suite has taken on another subject, to hold predictions against; ``Workload.errors()``

Counted operations are scaled as they follow from a subject's size: decoder layers by the weights of a layer, the number of layers and the
tokens that run through them (whole prompts, or what follows the image), and rows that a suite makes for every head, layer or visual token
by the number of those. Products of queries and keys, which the count leaves out, are added by formula. What students cost does not follow.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vlm_core.planning.counting import Work
from vlm_core.planning.sizes import Sizes

__all__ = ["Check", "Workload", "factor", "read_workload", "write_workload"]


@dataclass(frozen=True)
class Check:
    """What the same suite has taken on another subject: counted operations and processor seconds, by part."""

    sizes: Sizes
    flops: Mapping[str, float]
    seconds: Mapping[str, float]
    date: str

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Check:
        """Read a table back."""
        return cls(**{**content, "sizes": Sizes.from_dict(content["sizes"])})


@dataclass(frozen=True)
class Workload:
    """One profile's counted work.

    Parameters
    ----------
    profile : str
    sizes : mapping
        The profile's own numbers, as they were when it was counted.
    reference : Sizes
        Of the subject that was counted on.
    prompts : tuple of str
        What subjects are asked.
    work : tuple of Work
    seconds : mapping of part to float
        Processor seconds of the run that was counted, one core.
    claims : mapping of part to int
        Claim instances that were decided.
    made : mapping
        Command, commit, versions, machine, date.
    checks : tuple of Check
    """

    profile: str
    sizes: Mapping[str, Any]
    reference: Sizes
    prompts: tuple[str, ...]
    work: tuple[Work, ...]
    seconds: Mapping[str, float]
    claims: Mapping[str, int]
    made: Mapping[str, Any]
    checks: tuple[Check, ...] = field(default=())

    def flops(self, sizes: Sizes) -> dict[str, float]:
        """Operations of the suite on a subject, by part."""
        found: dict[str, float] = defaultdict(float)
        for one in self.work:
            found[one.part] += one.flops * (1.0 if one.model == "other" else _grown(one, self.reference, sizes))
        return dict(found)

    def passes(self, sizes: Sizes) -> dict[str, float]:
        """How many whole prompts, tails of prompts (what follows the image) and single tokens that is, through the subject's decoder, and
        on how many prompts gradients are computed."""
        token = sizes.layers * (2 * sizes.layer_weights + 4 * sizes.width * sizes.prompt_tokens)
        each = {"whole": token * sizes.prompt_tokens, "tail": token * sizes.tail_tokens, "one": token}
        found = dict.fromkeys((*each, "gradients"), 0.0)
        for one in self.work:
            if one.model == "subject" and one.kind == "layers":
                flops = one.flops * _grown(one, self.reference, sizes)
                found["gradients" if one.training else one.tokens] += flops / (3 * each["whole"] if one.training else each[one.tokens])
        return found

    def cpu_seconds(self, sizes: Sizes) -> dict[str, float]:
        """Processor seconds of one core of the counted machine, by part, at the operations a second of the counted run."""
        here = self.flops(self.reference)
        return {part: flops * self.seconds[part] / here[part] for part, flops in self.flops(sizes).items()}

    def beside(self, earlier: Workload) -> Workload:
        """With the parts that an earlier count of the same suite on the same subject has and this one lacks; its checks stay.

        Raises
        ------
        ValueError
            Where the earlier one was of other sizes: they do not add up.
        """
        if (earlier.sizes, earlier.reference, earlier.prompts) != (self.sizes, self.reference, self.prompts):
            raise ValueError(f"the stored work of '{self.profile}' is of other amounts or another subject: count the whole suite anew")
        kept = [part for part in earlier.seconds if part not in self.seconds]
        return replace(
            self,
            work=(*(one for one in earlier.work if one.part in kept), *self.work),
            seconds={**{part: earlier.seconds[part] for part in kept}, **self.seconds},
            claims={**{part: earlier.claims[part] for part in kept}, **self.claims},
            made={**self.made, **({"earlier": earlier.made} if kept else {})},
            checks=earlier.checks,
        )

    def errors(self) -> list[tuple[str, float, float]]:
        """Each checked subject, and the factors by which predicted operations and processor seconds were wrong, 1 or more."""
        found = []
        for one in self.checks:
            parts = sorted(one.flops.keys() & self.seconds.keys())
            sides = (self.flops(one.sizes), one.flops), (self.cpu_seconds(one.sizes), one.seconds)
            found.append((one.sizes.name, *(factor(*(sum(side[part] for part in parts) for side in pair)) for pair in sides)))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Builtins only."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Workload:
        """Read ``as_dict`` back."""
        made = {one.name: content[one.name] for one in fields(cls)}
        made["reference"] = Sizes.from_dict(content["reference"])
        made["work"] = tuple(Work(**one) for one in content["work"])
        made["checks"] = tuple(map(Check.from_dict, content["checks"]))
        return cls(**{**made, "prompts": tuple(content["prompts"])})


def _grown(one: Work, old: Sizes, new: Sizes) -> float:
    """By what a kind of work grows from one subject to another."""
    rows = {
        "fixed": 1.0,
        "layers": new.layers / old.layers,
        "heads": new.layers * new.heads / (old.layers * old.heads),
        "tokens": new.image_tokens / old.image_tokens,
    }[one.driver]
    if one.kind == "image":
        return rows * new.image_flops / old.image_flops
    if one.kind == "head":
        return rows * new.head_weights / old.head_weights
    tokens = {"whole": new.prompt_tokens / old.prompt_tokens, "tail": new.tail_tokens / old.tail_tokens, "one": 1.0}[one.tokens]
    # What was counted are linear maps; the products of a token with all keys come on top.
    per_token = 2 * new.layer_weights + 4 * new.width * new.prompt_tokens
    return rows * tokens * new.layers / old.layers * per_token / (2 * old.layer_weights)


def factor(predicted: float, measured: float) -> float:
    """By what two amounts differ, 1 or more."""
    return max(predicted / measured, measured / predicted)


def read_workload(file: str | Path, profile: str) -> Workload:
    """A profile's counted work.

    Raises
    ------
    ValueError
        One sentence: no such file, or a profile that was not counted.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no counted work at {path}: name the file that python -m fixtures.workload writes (--workload)")
    content = json.loads(path.read_text(encoding="utf-8"))
    if profile not in content:
        raise ValueError(
            f"the work of profile '{profile}' was not counted, that of {', '.join(content)} was: python -m fixtures.workload {profile}"
        )
    return Workload.from_dict(content[profile])


def write_workload(file: str | Path, workload: Workload) -> None:
    """Put a profile's counted work into a file, beside that of others."""
    path = Path(file)
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**content, workload.profile: workload.as_dict()}, indent=1) + "\n", encoding="utf-8")
