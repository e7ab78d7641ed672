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
]
