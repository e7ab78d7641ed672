"""The conformance suite: every family measures the same way, on tiny random-weight models built from configs.

``claims``, ``conftest``   a check of one claim on every model, and where its verdict goes
``models``, ``by_hand``    the models, how their numbers are compared, and with what
``test_*``                 the checks, by what is tested

What a family lacks must be refused in the sentence that ``Family.refusals`` gives. Each outcome is compared with its cell of
``SUPPORT.md`` (``python -m vlm_core.support`` writes it).
"""
