"""Which heads carry the image, and what else is to be known about heads.

``attribution``   HeAr: a linear model of the answer on which heads still see the image
``ranking``       heads from a map of scores; agreement of rankings
``draws``         random heads to compare with
"""
