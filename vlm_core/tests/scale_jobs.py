"""A stand-in for ``python -m pytest`` that leaves prepared runs at once, so that what runs jobs can be tested without what they measure.

``StandIn(folder)``   puts it on the path of child processes; what it is told and what it did lies in ``folder``

Told by files: ``hold-SUBJECT`` (wait until killed, once), ``wait-SUBJECT`` (wait until the file goes), ``exit-SUBJECT`` (end with this
status), ``runs/SUBJECT`` (the run to leave; else one of no claims).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil

from vlm_core.scale.config import ScaleConfig

PYTEST = '''
import json, os, shutil, sys, time
from pathlib import Path

given = dict(one.split("=", 1) for one in sys.argv[1:] if one.startswith("--claims-"))
told, name, out = Path(os.environ["STAND_IN"]), Path(given["--claims-subject"]).name, Path(given["--claims-out"])
with (told / "log").open("a") as log:
    log.write(f"{name} {os.getpid()}\\n")
hold, wait, ending = (told / f"{what}-{name}" for what in ("hold", "wait", "exit"))
if hold.exists():
    hold.rename(told / f"held-{name}")
    time.sleep(600)
while wait.exists():
    time.sleep(0.02)
if ending.exists():
    print("the stand-in's last words")
    sys.exit(int(ending.read_text()))
run = out / f"run-{name}"
if (told / "runs" / name).is_dir():
    shutil.copytree(told / "runs" / name, run)
else:
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"complete": True, "subject": name}))
(out / "latest").symlink_to(run.name)
'''


class StandIn:
    """See the module."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        (folder / "path").mkdir(parents=True)
        (folder / "path" / "pytest.py").write_text(PYTEST)
        monkeypatch.setenv("STAND_IN", str(folder))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "path"), str(Path(__file__).parents[2])]))

    def tell(self, what: str, name: str, text: str = "") -> None:
        """Leave a file for it."""
        (self.folder / f"{what}-{name}").write_text(text)

    @property
    def started(self) -> list[tuple[str, int]]:
        """Subject and process of every start so far."""
        log = self.folder / "log"
        return [(line.split()[0], int(line.split()[1])) for line in log.read_text().splitlines()] if log.exists() else []

    def held(self, name: str, seconds: float = 200) -> int:
        """The process that waits to be killed over a subject, once there is one."""
        until = time.monotonic() + seconds
        while not (self.folder / f"held-{name}").exists():
            assert time.monotonic() < until, f"nothing has started on {name}"
            time.sleep(0.02)
        return next(process for subject, process in reversed(self.started) if subject == name)


def subjects(folder: Path, *names: str) -> list[dict[str, str]]:
    """Directories that stand for checkpoints, as settings."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"name": name}))
    return [{"path": str(folder / name)} for name in names]


def write_config(path: Path, **content) -> Path:
    """A configuration in JSON, which YAML is a superset of."""
    path.write_text(json.dumps(content))
    ScaleConfig.from_file(path)
    return path


def gone(process: int, seconds: float = 20) -> bool:
    """Whether a process ends within some time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False
