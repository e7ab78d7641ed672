"""From measured tables to the tables and figures a reader sees: one function an exhibit, each left with a test's ``evidence``.

``ablation``   taking heads away, and ranking them
``heads``      what heads look at, what they are for, when they are used
``masks``      what follows from objects' masks: Head Impact, localisation heads, object tokens, words in the lens
``tracing``    where information flows: patching, cut edges, arrivals, the background
``tokens``     fewer visual tokens: curves, sensitivity by layer, accuracy against time, the recipe
``students``   what each way of training gave and cost
``shared``     means with their interval, heads as words

Nothing is measured here and no verdict depends on it; intervals drawn in figures come from ``vlm_core.stats``.
"""

from reports.exhibits import ablation, heads, masks, shared, students, tokens, tracing

__all__ = ["ablation", "heads", "masks", "shared", "students", "tokens", "tracing"]
