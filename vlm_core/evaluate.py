"""``python -m vlm_core.evaluate``: the same items to several subjects (`vlm_core.harness.command`).

``vlm_core.evaluate`` as a name is the function of `vlm_core.evaluation`. The import system sets a package's attribute to what it finds in
``sys.modules`` once a submodule of that name has run: this one leaves the function there, so that ``import vlm_core.evaluate`` and
``from vlm_core import evaluate`` give the same in whatever order.
"""

import sys

if __name__ == "__main__":
    from vlm_core.harness.command import main

    sys.exit(main())

from vlm_core.evaluation import evaluate

sys.modules[__name__] = evaluate
