"""How fast the instrument is, measured beside its peers: ``python -m vlm_core.bench``.

``subjects``     the models and prompts that are measured on
``plain``        the work done with plain transformers and forward hooks: the reference for numbers and for time
``peers``        the same work done with nnsight, TransformerLens and pyvene
``own``          the same work done with vlm_core
``works``        which work is compared with what, and the bars
``timing``       paired, interleaved rounds; medians with spread
``flops``        arithmetic by formula, and what a matrix product of the same shape reaches
``report``       rows, bars and the machine; JSON
``markdown``     the table

Nothing is timed whose result was not shown to be the same first.
"""
