"""The model under test.

``checkpoint``    what can be known without loading it
``subject``       loaded, with its processor and the seam; ``checks``: does the seam tell the truth on it
``embed``         prompts as the language model receives them; ``rows``: many rows of them in one pass
``activations``   one run's activations, embeddings, image keys and values, as sources of interventions
"""
