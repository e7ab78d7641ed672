"""What can be read from a forward pass.

``observers``    attention mass, entropy, overlap, top tokens, head outputs, hidden states; ``observing`` runs them over items
``sinks``, ``lens``, ``gradients``, ``means``   attention sinks, projections to words, gradients, streaming means
``recording_config``    which of them a recording switches on
"""
