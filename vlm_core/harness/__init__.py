"""The same prompts to several subjects, one line for each answer, gone on with after a kill.

``EvaluationConfig``, ``SubjectAt``, ``ItemSet``   what is asked of whom, from a file or from Python
``run_evaluation(config)``                         answers, scores with intervals, subjects side by side
``compare(a, b)``                                  two runs paired by item
``repeat(run)``                                    whether a run says the same again

``python -m vlm_core.evaluate`` is the command.
"""

from vlm_core.harness.comparing import Comparison, compare
from vlm_core.harness.config import EvaluationConfig, ItemSet, SubjectAt
from vlm_core.harness.repeating import Repetition, repeat
from vlm_core.harness.running import run_evaluation

__all__ = ["Comparison", "EvaluationConfig", "ItemSet", "Repetition", "SubjectAt", "compare", "repeat", "run_evaluation"]
