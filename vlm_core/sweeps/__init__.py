"""Many interventions x many items.

``sweep``        the tidy table
``engine``       a block of rows, each on the cheapest path that is exact: ``prefix`` (shared keys and values of what precedes the
                 question), ``resume`` (from the stored residual stream), or whole; ``trunk`` is what both start from, ``recorded``
                 brings rows and trunks together
``scoring``      answers from logits; ``features``: an image once; ``budget``: rows a batch
``shards``       results on disk, shared and resumed; ``executors``: this process, a pool, a cluster
"""
