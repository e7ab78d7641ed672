"""``python -m vlm_core.distill --config FILE``: distil as a file declares; goes on where it was killed.

Exit status: 0 done; 1 training diverged; 2 something is wrong with the configuration, the data or a checkpoint. Several processes:
``accelerate launch -m vlm_core.distill --config FILE`` (or ``torchrun``) trains in all of them; ``batch_size`` counts for each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm_core.distill", description="Distil a teacher into a small VLM, as a file declares."
    )
    parser.add_argument("--config", required=True, help="what to do: a .toml or .yaml file (vlm_core/distill/example.toml is one)")
    parser.add_argument("--out", help="folder of what comes out, in place of the one in the file")
    options = parser.parse_args(argv)

    from vlm_core.command_line import one_line, quiet, timed_lines
    from vlm_core.distill.config import DistillConfig
    from vlm_core.distill.processes import Processes
    from vlm_core.distill.running import distill
    from vlm_core.distill.training import TrainingDiverged
    from vlm_core.errors import SubjectError

    say = timed_lines()
    quiet()
    together = None
    try:
        together = Processes.joined()
        config = DistillConfig.from_file(options.config)
        config = config if options.out is None else replace(config, out=options.out)
        out = distill(config, together=together, say=say)
    except (SubjectError, ValueError, TrainingDiverged) as error:
        if together is None or together.is_first:
            print(f"{parser.prog}: {one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, TrainingDiverged) else 2
    finally:
        if together is not None:
            together.leave()
    if together.is_first:
        print(f"the student is {out / 'student'}; beside it student-metrics.csv, training-costs.csv, data-costs.csv, costs.csv and data-card.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
