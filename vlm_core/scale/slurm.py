"""The jobs of a configuration as a SLURM array, and a job that merges what they leave.

``write_scripts(config, file)``   ``jobs.sbatch``, ``merge.sbatch`` and ``submit.sh``, which hands in both

Each element of the array is ``python -m vlm_core.scale run CONFIG --job N``: it depends on no other, and one that is handed in again, or
requeued, does only what is missing. The scripts name a copy of the configuration: what is edited meanwhile changes no number.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from vlm_core.scale.config import Resources, ScaleConfig
from vlm_core.scale.jobs import jobs_of

__all__ = ["write_scripts"]


def write_scripts(config: ScaleConfig, file: str | Path, root: str | Path = ".") -> Path:
    """Write the scripts into ``OUT/slurm``.

    Parameters
    ----------
    file : path
        The configuration's; it is copied beside the scripts.
    root : path
        The checkout that jobs run in.

    Returns
    -------
    Path
        ``submit.sh``.
    """
    folder = Path(config.out).absolute() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    # By its content: elements that wait read the one that they were handed in with, also where another is handed in since.
    content = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    copy = folder / f"config-{content}{Path(file).suffix}"
    shutil.copyfile(file, copy)
    last = len(jobs_of(config)) - 1
    at_once = "" if config.resources.at_once is None else f"%{config.resources.at_once}"
    array = [f"--array=0-{last}{at_once}", "--requeue", f"--output={folder}/%A_%a.log"]
    scale = [sys.executable, "-m", "vlm_core.scale"]
    _write(folder / "jobs.sbatch", "claims", array, config.resources, root, [*scale, "run", str(copy), "--job"], '"$SLURM_ARRAY_TASK_ID"')
    once = replace(config.resources, cpus=1, gpus=0)
    _write(folder / "merge.sbatch", "claims-merge", [f"--output={folder}/merge-%j.log"], once, root, [*scale, "merge", str(copy)], "")
    submit = folder / "submit.sh"
    submit.write_text(
        "#!/bin/bash\n# Hands in the array, and the job that merges once all of its elements have ended, however they did.\n"
        "set -euo pipefail\n"
        f"array=$(sbatch --parsable {shlex.quote(str(folder / 'jobs.sbatch'))})\n"
        f'sbatch --dependency="afterany:${{array%%;*}}" {shlex.quote(str(folder / "merge.sbatch"))}\n',
        encoding="utf-8",
    )
    submit.chmod(0o755)
    return submit


def _write(path: Path, name: str, more: list[str], resources: Resources, root: str | Path, command: list[str], last: str) -> None:
    asked = [f"--job-name={name}", "--nodes=1", "--ntasks=1", f"--cpus-per-task={resources.cpus}", f"--mem={resources.memory}"]
    asked += [f"--time={resources.time}", *([f"--gres=gpu:{resources.gpus}"] if resources.gpus else [])]
    asked += [f"--{key}={getattr(resources, key)}" for key in ("partition", "account") if getattr(resources, key) is not None]
    lines = [f"#SBATCH {option}" for option in (*asked, *more, *resources.options)]
    text = "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path(root).absolute()))}",
            f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{resources.cpus}}}"',
            f"exec {shlex.join(command)} {last}".rstrip(),
            "",
        ]
    )
    path.write_text(text, encoding="utf-8")
