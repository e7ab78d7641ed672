"""A run that is killed, with no chance to say anything, and started again ends in the same student, bit by bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from vlm_core import DropTokens
from vlm_core.distill import Budget, Lora, instruction_set, on_policy, preference, prompt_set, sft
from vlm_core.distill.training import _MarksWhole, newest_checkpoint
from vlm_core.tests.distill_students import preferences, save_student, weights
from vlm_core.tests.tiny import make_items
from vlm_core.tests.warm import run

BUDGET = Budget(steps=11, batch_size=3, learning_rate=1e-3)
KILLED_AFTER = 7
KINDS = ("sft", "preference", "on_policy", "adapters under a recipe", "while saving")
# The runs that are killed are children of a process that imports once what is above.
KILLING = """
import os, sys
from pathlib import Path
from vlm_core.tests import test_distill_killed as here
for kind in here.KINDS:
    child = os.fork()
    if not child:
        here.train_and_die(kind, Path(sys.argv[1]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def train(kind, folder, out, checkpoints, progress=None):
    """Several epochs of eight rows or fewer."""
    items, options = make_items(8), {"seed": 3, "checkpoints": checkpoints, "progress": progress}
    student, answers = folder / "student", [item["answer"] for item in items]
    if kind == "preference":
        return preference(student, preferences(8), BUDGET, out, image_term=0.5, **options)
    if kind == "on_policy":
        return on_policy(student, folder / "teacher", prompt_set(items), BUDGET, out, **options)
    if kind == "adapters under a recipe":
        options |= {"lora": Lora((1,)), "recipe": DropTokens(1, 0.5)}
    return sft(student, instruction_set(items, answers), BUDGET, out, **options)


def die():
    """kill -9."""
    import os

    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(kind, folder):
    """Until the seventh step, or in the middle of writing the checkpoint of the sixth."""

    def progress(done, steps):
        if done == KILLED_AFTER:
            die()

    if kind == "while saving":
        mark = _MarksWhole.on_save

        def half_written(self, args, state, control, **kwargs):
            if state.global_step == 6:
                (Path(args.output_dir) / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
                die()
            mark(self, args, state, control, **kwargs)

        _MarksWhole.on_save = half_written
    train(kind, folder, folder / "killed" / kind, folder / "checkpoints" / kind, progress)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Where runs of every kind were killed."""
    folder = tmp_path_factory.mktemp("killed")
    save_student(folder / "student")
    save_student(folder / "teacher", seed=7, layers=3)
    done = run(["-c", KILLING, folder], timeout=300)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(KINDS), done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_to_the_same_student(kind, killed, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert not (killed / "killed" / kind / "training.json").exists()
        last = 5 if kind == "while saving" else KILLED_AFTER - 1
        assert Path(newest_checkpoint(killed / "checkpoints" / kind)).name == f"checkpoint-{last}"
        steps = []
        again = train(kind, killed, killed / "killed" / kind, killed / "checkpoints" / kind, lambda done, n: steps.append(done))
        whole = train(kind, killed, tmp_path / "whole", tmp_path / "checkpoints")
    finally:
        torch.set_num_threads(threads)
    assert steps == list(range(last + 1, BUDGET.steps + 1))
    first, second = weights(whole), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [json.loads((out / "training.json").read_text()) for out in (whole, again)]
    assert all(log.pop("seconds") > 0 for log in logs)
    assert logs[0] == logs[1]
