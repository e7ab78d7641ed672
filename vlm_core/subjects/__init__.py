"""The model under test.

``checkpoint``    what can be known without loading it
``subject``       in memory, with its processor and the seam; ``load``: from a checkpoint; ``checks``: does the seam tell the truth
``wording``, ``batch``, ``fingerprint``   its texts, prompts as its inputs, what measurements on it depend on
``embed``         prompts as the language model receives them; ``rows``: many rows of them in one pass
``groups``        token groups that callers name in them
``activations``   one run's activations, embeddings, image keys and values, as sources of interventions
"""
