"""The drawings: one function a figure kind, data in, ``(figure, tips)`` out.

``claims``     what tests leave about heads, tokens and layers
``students``   what training did to a student
``nights``     estimate and evidence night by night

``tips`` maps the id of a drawn group to the text a reader gets when pointing at it. Direct labels instead of
legends; axis labels are words with units; colours only from ``reports.figures.COLOURS``.
"""
