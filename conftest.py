pytest_plugins = ["reports.plugin", "fixtures.subjects", "fixtures.probe_sets", "fixtures.measurements", "fixtures.tracing_measurements", "fixtures.students"]
