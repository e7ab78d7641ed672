"""What can be read from a forward pass.

``attention``          where heads attend: mass on token groups, entropy, top tokens, the full map
``image_attention``    attention on every image token, its overlap with an object, how few tokens hold it
``outputs``            head outputs, the residual stream
``likeness``           how alike a group's tokens are in the residual stream
``position``           how far back heads look, and what rotary positions do to them
``sinks``, ``lens``, ``gradients``, ``means``   attention sinks, projections to words, gradients, streaming means
``at``                 an observer in some layers and heads only
``observing``          runs them over items
``recording_config``   which of them a recording switches on
``declaring``          what their declarations share

An observer is a small frozen declaration with ``attention(view)`` or ``layer(view)``, which returns a tensor (or a dict of them)
with one entry per element, or None for "not this layer". ``axes`` names what follows item and layer, for observers small enough to
be rows of a table; ``ragged`` names the axes (counted from the end) that are as long as a token group is; ``reads_hidden = False`` says
that ``attention(view)`` leaves ``view.hidden`` alone, which then costs no hooks on layers, and ``reads_unrotated = True`` that it reads
``view.unrotated``, which costs another look at queries and keys. Two kinds need more: one
with ``parts(subject, items, encoded)`` is observed as several plain ones, whose records its ``combine`` joins; one with
``measure(subject, items, encoded, intervention)`` makes passes of its own (gradients). ``prepare(subject, items)``, where there is
one, is called once before everything, and ``require_there(anatomy, tokens=None)`` before any pass: it refuses layers, heads and, where the
batch is known (``vlm_core.seam.views.Tokens``), token groups that are not there.
"""
