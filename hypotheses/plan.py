"""The plan that a reader can hold the suite to, written from what is declared: ``python -m hypotheses.plan`` rewrites ``README.md``.

``declared``  every claim with its instances, module by module, as pytest collects them
``text``      the plan
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fixtures.arms import ARMS
from fixtures.profiles import PROFILES
from probes import GROUNDING_TASKS
from probes.tasks import TASKS
from reports import claims, literature
from reports.record import describe_params

PATH = Path(__file__).with_name("README.md")
SIZES = {
    "tasks": "grounding tasks asked; claims about another are not run, and keep their share of the error rate",
    "discovery_items": "discovery items a task, on which things are chosen",
    "confirmation_items": "confirmation items a task, on which claims are decided",
    "spoken_items": "of these, answered in the subject's own words too",
    "explored_items": "of these, those on which exploratory claims compare gates and budgets",
    "attribution_masks": "random sets of heads a discovery item",
    "random_draws": "random sets of heads of the same layers that the targeted ones are compared with",
    "compared_items": "discovery items a task on which policies that keep fewer tokens are compared",
    "curve_items": "discovery items a task on which a recipe must be harmless",
    "timed_rounds": "paired runs on the clock",
    "sft_steps": "optimiser steps of a training run",
    "sft_seeds": "training runs of the arms that the first claims rest on",
    "arm_seeds": "training runs of other arms",
}
DECIDED_BY = {
    "superiority": ("the lower bound of the effect is above {0:g}", "its upper bound is below {0:g}"),
    "non-inferiority": ("the upper bound of the loss is below {0:g}", "its lower bound is above {0:g}"),
    "equivalence": ("both bounds of the effect lie within ±{0:g}", "both lie outside, on the same side"),
    "trend": (
        "the lower bound of the contrast over the ordered conditions is above 0, and the ordered test's p below the error rate",
        "its upper bound is below 0",
    ),
}

TEXT = """# What is tested, and what would count

Written by `python -m hypotheses.plan` from the declarations of the tests in this folder; a test fails where the two differ. It holds no result: results are in
a run's report. {n_claims} claims ({n_confirmatory} confirmatory), decided in {n_instances} instances.

* **H1** A small subset of attention heads carries most cross-modal grounding; taking it away costs much.
* **H2** Visual tokens become redundant after the middle layers; many can go at little cost.
* **H3** Distillation improves a small student, more so where training emphasises grounded answers or uses few tokens.

## How a claim is decided
A claim declares its effect, threshold, error rate and least number of {units} before anything is measured; the hash beside it changes with any word of that. The
effect is paired: the same item with and without what is tested. {Units} are resampled, never single items, and where students are trained, training runs too. A condition that is
named with what is measured has to hold as well, or the claim is not supported.

| verdict | |
|---|---|
| **supported** (success) | the whole interval lies on the declared side of the threshold |
| **refuted** (failure) | the whole interval lies on the other side: a result, too |
| **inconclusive** | the interval includes the threshold; "not significant" supports nothing |
| **invalid** | a control failed, the task leaves no room to drop or gain over what is had blind, there is less data than declared, or the subject lacks what is needed |

Confirmatory claims decide how a run ends; exploratory ones are reported beside them and never do. One-sided error rates are shared equally within a hypothesis
and tier, whatever part of it is run:

{families}

Heads, layers, policies, recipes and rankings are chosen on the *discovery* split and claims decided on the *confirmation* split, which has other scenes. A threshold is never changed
because of a result, and never by a profile; `--claims-alpha` gives a run another error rate, and every record of it then says so.

## Subjects
One model a run, `--claims-subject`: any folder or Hub id whose decoder uses transformers' attention interface ([families](../vlm_core/SUPPORT.md)). The default is the
embedded VLM and, for H3, the embedded student ([card](../fixtures/embedded/CARD.md)); in H3 the subject is the teacher. What a subject is known not to do is written down beside it and expected by name; nothing else is.

## Data
Procedural scenes whose every answer is known ([data card](../probes/CARD.md)). Grounding tasks: {tasks}; `identification` for claims about an object's own tokens.

{task_table}

| size | {profile_names} |
|---|{profile_rule}
{sizes}

## Metrics and ablations
* **Accuracy**: candidates are scored by log-probability, and decide; beside them, on some of the items, what the subject writes of its own accord is right where it names the answer and no other candidate. The blind floor (another scene's image), chance and the majority answer stand beside. A subject at its floor in a task, or in all of them together, makes the claims about it invalid; in H3 that is the teacher. **Answer logit** and normalised logit difference where accuracy is too coarse.
* **Heads**: attribution by a linear model over random sets of heads, held to its prediction of sets it has not seen; faithfulness, completeness, Kendall's W and τ. Heads are ablated by replacing image keys and values by their
  mean, against random heads of the same layers and number, of any layers, and against disturbing the same heads as much.
* **Tokens**: accuracy by layer and share kept, effective rank, nearest-neighbour similarity, operations and time of the prefill. Policies that look at the tokens are compared with random, evenly spaced and pooled ones at equal numbers of tokens; object tokens
  become the mean token, against as many other tokens.
* **Flow**: edges between token groups cut in windows of layers, activations patched both ways under two corruptions, logit lens.
* **Students**: accuracy before and after, per task, over training runs; tokens, operations and seconds of training, beside them the operations of making the data (the teacher's answers, samples of a student, their ranking). The arms:

| arm | trained on | after | steps |
|---|---|---|---|
{arms}

## Claims
{claims}

## Literature
What each work claimed, on what evidence, about which models, and which claims here rest on it. A verdict here is about the run's subject: it neither confirms nor refutes a
figure that was measured on another.

{literature}

## Scope
* One subject at a time; images with one question and a short answer. What is looked into and changed is the language model; the image encoder is taken as it is.
* Claims rest on interventions. Attention maps illustrate; where attention is itself the quantity, the claim says so.
* The student is small and trained for minutes: H3 asks whether a difference between arms is there, not how good a student can get.

Out of scope: photographs and public benchmarks as evidence for a verdict, open-ended generation and its quality, hallucination and safety, languages other than the probes' English, video,
training at scale, a ranking of models.

## Risks, and what is done about them
| risk | what is done |
|---|---|
| The effect is had without looking | blind floors, swapped images and room to move stand beside claims about accuracy |
| An ablation breaks the model rather than the mechanism | means in place of zeros, matched random controls, placebo of the same size, an intervention on all heads that must reach the blind floor |
| Choosing and testing on the same data | disjoint scenes, their hashes in every run |
| Many tests, one of them lucky | error rates shared by all that is declared; exploratory claims never decide |
| Few training runs | runs are resampled too; fewer than declared make the claim invalid |
| A noisy clock | paired runs, a run timed against itself as a control |
| The machinery is wrong | null and power simulations, reference values, models with planted heads that must be found, models with random weights that must support nothing |
| The default subject was made by this repository for these probes | said in its card; its known refutations stand in a file; point the suite at another checkpoint |
| Synthetic scenes are not photographs | no claim is made beyond the probes; the literature table names where a figure comes from |

## Ethics
No person, real place or personal data is in the probes. The suite is for research: a verdict is about a subject on these probes and is no guarantee for safety or deployment. A teacher
behind an API is used through recorded answers only, under its own terms. The default run needs two cores for minutes, and trains no model from scratch.

## Data and licences
Code, probes, the embedded models and this text: Apache-2.0. Nothing is downloaded at run time. Published methods are re-implemented from their definitions; no code of
theirs is included. A checkpoint, data set or recorded answer that is brought along keeps its own licence and terms.
"""


@dataclass
class Declared:
    """One claim as the suite declares it.

    Attributes
    ----------
    claim : vlm_core.stats.Claim
    module : module
        The one that tests it.
    needs : list of str
        Capabilities that the subject's family must have.
    params : list of dict
        One of each instance.
    """

    claim: object
    module: object
    needs: list
    params: list = field(default_factory=list)


class _Collected:
    def pytest_collection_modifyitems(self, items):
        self.found = claims.instances(items)


def declared():
    """Every claim of the suite, in the order of collection, and the sizes of its families.

    Returns
    -------
    list of Declared
    dict
        (hypothesis, tier) → number of instances.

    Raises
    ------
    RuntimeError
        With what pytest said, where it cannot collect the suite.
    """
    collected, said = _Collected(), io.StringIO()
    root = PATH.parents[1]
    whole = "--claims-profile=default"  # asks every task, whatever a user's settings say
    arguments = ["--collect-only", "-qq", whole, "-p", "no:cacheprovider", f"--rootdir={root}", "-c", str(root / "pytest.ini"), str(PATH.parent)]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(arguments, plugins=[collected])
    if code != 0:
        raise RuntimeError(f"the suite cannot be collected: {said.getvalue()}")
    by_id = {}
    for item, instance in collected.found.items():
        one = by_id.setdefault(instance.claim.id, Declared(instance.claim, item.module, claims.required(item)))
        one.params.append(instance.params)
    return list(by_id.values()), claims.family_sizes(collected.found)


def text():
    """The plan, as Markdown."""
    found, families = declared()
    every = [one.claim for one in found]
    units = _listing(sorted({f"{claim.unit}s" for claim in every}))
    return TEXT.format(
        n_claims=len(every),
        n_confirmatory=sum(claim.tier == "confirmatory" for claim in every),
        n_instances=sum(len(one.params) for one in found),
        units=units,
        Units=units.capitalize(),
        families=_families(every, families),
        tasks=_listing([f"`{task}`" for task in GROUNDING_TASKS]),
        task_table=_table(("task", "what is asked"), [(name, TASKS[name].description) for name in (*GROUNDING_TASKS, "identification")]),
        profile_names=" | ".join(PROFILES),
        profile_rule="---|" * len(PROFILES),
        sizes="\n".join(_row(said, *(_size(getattr(profile, name)) for profile in PROFILES.values())) for name, said in SIZES.items()),
        arms="\n".join(_row(f"{arm.name}: {arm.words}", arm.data, arm.after or "the student as it is", arm.steps) for arm in ARMS.values()),
        claims="\n\n".join(_modules(found, families)),
        literature=_literature(every),
    )


def _size(value):
    if value == GROUNDING_TASKS:
        return "all"
    return _listing([f"`{task}`" for task in value]) if isinstance(value, tuple) else value


def _families(every, sizes):
    rows = []
    for (hypothesis, tier), size in sorted(sizes.items()):
        alphas = sorted({claim.alpha for claim in every if (claim.hypothesis, claim.tier) == (hypothesis, tier)})
        rows.append((hypothesis, tier, size, _listing([f"{alpha:g}" for alpha in alphas]), _listing([f"{alpha / size:.2g}" for alpha in alphas])))
    return _table(("hypothesis", "tier", "instances", "error rate of all", "of each bound"), rows)


def _modules(found, families):
    """A section a hypothesis, and in it one a test module: what it says of itself, and its claims."""
    sections = defaultdict(list)
    for one in found:
        sections[Path(one.module.__file__)].append(one)
    last = None
    for file, its in sorted(sections.items(), key=lambda section: _place(*section)):
        heading, _, how = its[0].module.__doc__.strip().partition("\n")
        path = file.relative_to(PATH.parent).as_posix()
        opening = [f"### {file.parent.name.upper()}"] if file.parent.name != last else []
        last = file.parent.name
        yield "\n\n".join(
            part
            for part in (
                *opening,
                f"#### {heading.rstrip('.')}",
                how.strip(),
                f"[`{path}`]({path})",
                "\n".join(_claim(one, families) for one in its),
            )
            if part
        )


def _place(file, its):
    """By hypothesis, modules with confirmatory claims first."""
    return file.parent.name, all(one.claim.tier == "exploratory" for one in its), file.name


def _claim(one, families):
    claim = one.claim
    supported, refuted = (said.format(claim.test.limit) for said in DECIDED_BY[claim.test.kind])
    size = families[claim.hypothesis, claim.tier]
    least = f"{claim.min_clusters} {claim.unit}s" + (f" and {claim.min_seeds} training runs" if claim.min_seeds > 1 else "")
    needs = f"; the subject's family must be able to do `{'`, `'.join(one.needs)}`" if one.needs else ""
    where = [describe_params(params) for params in one.params if params]
    lines = [
        f"* **{claim.id}** ({claim.tier}) {claim.sentence}",
        f"  * measured: {claim.effect}",
        f"  * success: {supported}; failure: {refuted}",
        f"  * each bound at {claim.alpha:g} / {size}; at least {least}{needs}",
        *([f"  * decided for {'; '.join(where)}"] if where else []),
        f"  * source: {claim.source}; declaration `{claim.hash}`",
    ]
    return "\n".join(lines)


def _literature(every):
    rows = []
    for work in literature.WORKS:
        tested = ", ".join(claim.id for claim in literature.tested(work, every))
        rows.append((f"[{work.name}]({work.url}), {work.authors}", work.claim, work.evidence, work.subject, f"{tested}. {work.differs}", work.known_from))
    return _table(("work", "claim", "evidence", "subject", "what is tested of it here", "known from"), rows)


def _table(columns, rows):
    return "\n".join([_row(*columns), "|" + "---|" * len(columns), *(_row(*row) for row in rows)])


def _row(*cells):
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _listing(names):
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
    print(PATH)
