"""Effects per item: what a verdict was read from, kept beside the run to be compared item by item later.

``pack``     rows of a decision, ready to be stored
``store``    what stands in a record for them; the rows go into arrays that are named by their content
``load``     the rows back, every float exact
``copy``     their arrays into another folder
``matched``  the rows that two runs share, in one order
"""

from __future__ import annotations

import shutil

import numpy as np

from reports import record

ROW = np.dtype([("effect", "<f8"), ("cluster", "<i4"), ("seed", "<i4")])


def pack(effect, clusters, seeds=None, bounds=(-1.0, 1.0)):
    """Rows of a decision.

    Parameters
    ----------
    effect : [row]
    clusters : [row]
    seeds : [row], optional
    bounds : (low, high) or None
        Range that one effect cannot leave.

    Returns
    -------
    dict or None
        ``effect``, ``clusters`` and ``seeds`` (or None): arrays, [row], ids as text; ``bounds`` (or None). None where rows are no finite
        effect with a cluster each: nothing can be read from them.
    """
    if clusters is None or not hasattr(effect, "__len__"):
        return None
    try:
        values = np.asarray(effect, dtype=float)
    except (TypeError, ValueError):
        return None
    ids = _texts(clusters)
    if values.ndim != 1 or not values.size or ids.shape != values.shape or not np.all(np.isfinite(values)):
        return None
    return {
        "effect": values,
        "clusters": ids,
        "seeds": None if seeds is None else _texts(seeds),
        "bounds": None if bounds is None else [float(bounds[0]), float(bounds[1])],
    }


def _texts(ids):
    return np.array([str(one) for one in np.asarray(ids).tolist()], dtype=str)


def store(rows, arrays):
    """What stands in a record: references to the arrays, which ``arrays`` takes (`reports.record.store_array`).

    Parameters
    ----------
    rows : dict or None
        From `pack`.
    arrays : dict

    Returns
    -------
    dict or None
    """
    if rows is None:
        return None
    names, codes = np.unique(rows["clusters"], return_inverse=True)
    labels, seeds = (np.array([]), np.full(len(codes), -1)) if rows["seeds"] is None else np.unique(rows["seeds"], return_inverse=True)
    table = np.empty(len(codes), ROW)
    table["effect"], table["cluster"], table["seed"] = rows["effect"], codes.ravel(), seeds.ravel()
    encoded = np.array([name.encode() for name in names.tolist()])
    return {
        "rows": record.store_array(table, arrays),
        "clusters": record.store_array(encoded, arrays),
        "seeds": None if rows["seeds"] is None else labels.tolist(),
        "bounds": rows["bounds"],
    }


def load(folder, stored):
    """The rows that a record's ``effects`` stand for.

    Parameters
    ----------
    folder : pathlib.Path
        The run, or wherever they were copied to.
    stored : dict

    Raises
    ------
    OSError, reports.record.RecordError
        Where an array is missing, or not what its name says.
    """
    table = record.read_array(folder, stored["rows"])
    names = np.array([name.decode() for name in record.read_array(folder, stored["clusters"]).tolist()], dtype=str)
    labels = stored["seeds"]
    return {
        "effect": table["effect"],
        "clusters": names[table["cluster"]],
        "seeds": None if labels is None else np.array(labels, dtype=str)[table["seed"]],
        "bounds": stored["bounds"],
    }


def copy(stored, source, target):
    """Copy the arrays of a record's effects from one folder to another, each whole or not at all."""
    for reference in (stored["rows"], stored["clusters"]):
        name = f"{reference['array']}.npy"
        place = target / record.ARRAYS / name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(f".{name}.partial")
            shutil.copyfile(source / record.ARRAYS / name, partial)
            partial.replace(place)


def matched(first, second):
    """The rows that two runs share: the same cluster and seed, in clusters that have as many rows in both.

    Parameters
    ----------
    first, second : dict
        As `pack` gives them; rows of a cluster and seed are paired in their order.

    Returns
    -------
    dict
        ``first``, ``second`` : effects, [row]; ``clusters`` and ``seeds`` (or None) of the rows; ``only`` : how many rows have no partner,
        both runs together.
    """
    groups = [_groups(rows) for rows in (first, second)]
    shared = [key for key, values in groups[0].items() if len(groups[1].get(key, ())) == len(values)]
    pairs = [np.array([value for key in shared for value in group[key]], dtype=float) for group in groups]
    keys = [key for key in shared for _ in groups[0][key]]
    return {
        "first": pairs[0],
        "second": pairs[1],
        "clusters": np.array([cluster for cluster, _ in keys], dtype=str),
        "seeds": None if first["seeds"] is None else np.array([seed for _, seed in keys], dtype=str),
        "only": len(first["effect"]) + len(second["effect"]) - 2 * len(keys),
    }


def _groups(rows):
    found = {}
    seeds = [None] * len(rows["effect"]) if rows["seeds"] is None else rows["seeds"].tolist()
    for value, cluster, seed in zip(rows["effect"].tolist(), rows["clusters"].tolist(), seeds, strict=True):
        found.setdefault((cluster, seed), []).append(value)
    return found
