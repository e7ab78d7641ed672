"""Many subjects, many claims and benchmarks: one file expands to jobs that run anywhere and are merged into one report.

``python -m vlm_core.scale {plan,run,slurm,merge,status} CONFIG``

``config``    what is wanted, as a declaration that fits in a file
``jobs``      what it expands to: command lines, each with an id by content and a folder of its own
``running``   one job: taken up once, its marker written last
``backends``  where jobs run: processes of this machine, or a Ray cluster
``slurm``     the same jobs as a SLURM array
``merging``   what finished jobs left, as one report
"""
