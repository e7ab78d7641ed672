"""Night after night: is it still so, and does it hold on new scenes?

``lanes``       both questions in a session: read and reserve before anything is measured, compare and append after
``baselines``   the same again, item by item, against a stored run
``history``     fresh scenes, evidence added up in e-processes
``ledger``      append-only JSON lines, whole or not at all
``sparkline``   a claim's nights beside its verdict
``trend``       the page of a history
"""
