"""What a sweep is asked for, looked through before anything runs.

``require_asked(...)``      refuse arguments of ``sweep`` that cannot be meant, each in one sentence
``require_sendable(...)``   refuse what cannot travel to another process
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from vlm_core.interventions import Intervention, describe, require_row
from vlm_core.interventions.numeric import integer
from vlm_core.items import SCORED, item_field, require_items
from vlm_core.sweeps.executors import ProcessExecutor, require_source
from vlm_core.sweeps.scoring import METRICS

__all__ = ["require_asked", "require_sendable"]


def require_asked(
    subject: Any,
    items: Any,
    interventions: Any,
    *,
    batch_rows: Any,
    metrics: Any,
    progress: Any,
    assignments: Any,
    store: Any,
    groups: Any,
    executor: Any,
) -> None:
    """Refuse what ``vlm_core.sweep`` cannot do; its arguments, by the same names.

    Raises
    ------
    TypeError
        For what is of the wrong kind: interventions, an executor, a callable.
    ValueError
        For everything else.
    """
    require_source(subject)
    require_items(items, SCORED)
    labels = _labels(interventions)
    _require_metrics(metrics, items)
    if batch_rows is not None:
        integer(batch_rows, "batch_rows", least=1)
    if assignments is not None:
        _require_assignments(assignments, len(items), labels)
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be True, False, None or a callable of (rows done, rows in all), got {_shown(progress)}")
    if groups is not None and not callable(groups):
        raise TypeError(f"groups must be a callable of (item, prompt) or None, got {_shown(groups)}")
    if store is not None:
        _require_folder(store)
    if executor is not None:
        if isinstance(executor, type) or not callable(getattr(executor, "submit", None)):
            raise TypeError(
                f"executor must be None or an executor such as ProcessExecutor(2) or RayExecutor(2), got {_shown(executor)}: make one"
            )
        if isinstance(executor, ProcessExecutor | ProcessPoolExecutor):
            require_sendable(groups, "groups")
            require_sendable(subject, "the subject's source")


def require_sendable(value: Any, name: str) -> None:
    """Refuse what cannot be pickled.

    Raises
    ------
    ValueError
    """
    # A subject itself is refused with a sentence of its own.
    if value is None or isinstance(value, str | Path) or not callable(value):
        return
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        shown = getattr(value, "__qualname__", type(value).__qualname__)
        raise ValueError(
            f"{name} ({shown}) cannot be sent to another process: name a function at the top level of an importable module, or use "
            f"functools.partial of one, no lambda and no function inside another"
        ) from error


def _labels(interventions: Any) -> set:
    if isinstance(interventions, Mapping):
        for label, row in interventions.items():
            require_row(row, f"the intervention {label!r}")
        return set(interventions)
    if isinstance(interventions, str | Intervention) or not isinstance(interventions, Sequence):
        raise TypeError(
            f"interventions must be a mapping of labels to rows, or a list of rows, got {_shown(interventions)}: write "
            f"{{'full': None, 'cut': ZeroHeads([(0, 1)])}}, also of one"
        )
    for number, row in enumerate(interventions):
        require_row(row, f"intervention {number} of the list")
    return {describe(row) for row in interventions}


def _require_metrics(metrics: Any, items: Sequence) -> None:
    known = f"{', '.join(METRICS)}, candidate 0, candidate 1, ..."
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be several names, got the text {metrics!r}: write ({metrics!r},)")
    if not isinstance(metrics, Sequence) or not len(metrics):
        raise ValueError(f"metrics must be a list of at least one of {known}, got {_shown(metrics)}")
    unknown = [one for one in metrics if not isinstance(one, str) or not (one in METRICS or re.fullmatch(r"candidate \d+", one))]
    if unknown:
        raise ValueError(f"unknown metrics {unknown}: choose from {known}")
    twice = [name for name, n in Counter(metrics).items() if n > 1]
    if twice:
        raise ValueError(f"metrics name '{twice[0]}' {Counter(metrics)[twice[0]]} times: once is enough")
    asked = [int(one.removeprefix("candidate ")) for one in metrics if one.startswith("candidate ")]
    most = _most_candidates(items) if asked else None
    if most is not None and max(asked) >= most:
        raise ValueError(
            f"there is no 'candidate {max(asked)}': no item has more than {most} candidates, which are counted from 0 ('candidate 0' to "
            f"'candidate {most - 1}')"
        )


def _most_candidates(items: Sequence) -> int | None:
    """The most candidates that an item has; None where only reading every item, image and all, would tell."""
    if hasattr(items, "select_columns"):
        items = items.select_columns(["candidates"])
    elif not isinstance(items, list | tuple):
        return None
    return max((len(item_field(item, "candidates")) for item in items), default=None)


def _require_assignments(assignments: Any, n_items: int, labels: set) -> None:
    if isinstance(assignments, str | Mapping) or not isinstance(assignments, Sequence):
        raise ValueError(f"assignments must be a list of pairs (item index, label), got {_shown(assignments)}")
    for one in assignments:
        if isinstance(one, str) or not isinstance(one, Sequence) or len(one) != 2:
            raise ValueError(f"assignments must be pairs (item index, label), got {one!r} among them")
        index, label = one
        if not 0 <= integer(index, "an assignment's item index") < n_items:
            raise ValueError(f"assignments name item {index}, but there are {n_items} items, counted from 0")
        if not isinstance(label, Hashable) or label not in labels:
            raise ValueError(f"assignments name the intervention {label!r}, which is not among the interventions")


def _require_folder(store: Any) -> None:
    if not isinstance(store, str | Path) or not str(store):
        raise TypeError(f"store must be a directory's path or None, got {_shown(store)}")
    for folder in (Path(store), *Path(store).parents):
        if folder.exists():
            if not folder.is_dir():
                raise ValueError(f"store {str(store)!r} cannot be a directory: {str(folder)!r} is a file, name another path")
            return


def _shown(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{value!r:.60} ({type(value).__name__})"
