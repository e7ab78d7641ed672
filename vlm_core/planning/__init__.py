"""What a suite will cost on a subject, known before anything is computed on it.

``python -m vlm_core.plan SUBJECT PROFILE``

``sizes``      a subject's size, prompt lengths and operations, from its configuration alone
``workload``   what a profile's suite makes a model do, as counted in a run, scaled to another subject by formula
``counting``   the instrument that counts it
``devices``    how fast known devices are
"""
