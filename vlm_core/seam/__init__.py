"""The one seam: what happens inside a forward pass.

``seam``        attention function and hooks, what is active
``run``         one program followed through one pass; its parts: ``attending`` (heads, keys, edges), ``residual`` (patches,
                directions, tokens), ``shortening`` with ``dropping`` and ``merging``, ``branching``, ``layer_inputs``
``plan``        interventions compiled for a batch; ``positions``, ``masks``: what they name and cut
``views``       what observers are shown
"""
