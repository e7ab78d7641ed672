"""Fixtures of the claims, and what every run of pytest here has in common."""

import gc

pytest_plugins = [
    "reports.plugin",
    "fixtures.ordering",
    "fixtures.subjects",
    "fixtures.probe_sets",
    "fixtures.measurements",
    "fixtures.h1_rankings",
    "fixtures.h1_measurements",
    "fixtures.tracing_measurements",
    "fixtures.mask_measurements",
    "fixtures.token_measurements",
    "fixtures.redundancy_measurements",
    "fixtures.students",
    "fixtures.student_results",
]


def pytest_collection_finish():
    """What was imported and collected stays to the end: no later search for garbage looks through it (a quarter of a second each)."""
    gc.collect()
    gc.freeze()
