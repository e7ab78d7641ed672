"""``python -m vlm_core.distill --config FILE``: distil as a file declares; goes on where it was killed.

Exit status: 0 done; 1 training diverged; 2 something is wrong with the configuration, the data or a checkpoint. Several processes:
``accelerate launch -m vlm_core.distill --config FILE`` (or ``torchrun``) trains in all of them; ``batch_size`` counts for each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm_core.distill", description="Distil a teacher into a small VLM, as a file declares."
    )
    parser.add_argument("--config", required=True, help="what to do: a .toml or .yaml file (vlm_core/distill/example.toml is one)")
    parser.add_argument("--out", help="folder of what comes out, in place of the one in the file")
    options = parser.parse_args(argv)

    import datasets
    from transformers.utils import logging as transformers_logging

    from vlm_core.distill.config import DistillConfig
    from vlm_core.distill.processes import Processes
    from vlm_core.distill.running import distill
    from vlm_core.distill.training import TrainingDiverged
    from vlm_core.errors import SubjectError
    from vlm_core.memory import keep_freed_memory

    start = perf_counter()
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    together = None

    def say(words: str) -> None:
        print(f"{perf_counter() - start:7.1f} s  {words}", file=sys.stderr, flush=True)

    try:
        together = Processes.joined()
        config = DistillConfig.from_file(options.config)
        config = config if options.out is None else replace(config, out=options.out)
        out = distill(config, together=together, say=say)
    except (SubjectError, ValueError, TrainingDiverged) as error:
        if together is None or together.is_first:
            print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, TrainingDiverged) else 2
    finally:
        if together is not None:
            together.leave()
    if together.is_first:
        print(f"the student is {out / 'student'}; beside it student-metrics.csv, training-costs.csv, costs.csv and data-card.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
