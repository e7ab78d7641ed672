"""Which heads carry the image, and what else is to be known about heads.

``attribution``   HeAr: a linear model of the answer on which heads still see the image
``ranking``       heads from a map of scores
``rankings``      what else heads may be ranked by: attention mass, single-head ablation, gradient x gate
``curves``        how much of the image's effect the first heads of a ranking carry: faithfulness and completeness
``agreement``     agreement of rankings, depth of attribution, attribution against attention
``grid``          ways to take heads away, and what each costs
``features``      attention, position, sinks and output norm of every head: one row a head
``taxonomy``      categories of heads by what the answer loses without a path; clusters of features
``probing``       linear probes on features of heads, against shuffled labels
``semantics``     whether heads are used by what is asked, or by what images look like
``report``        what the first heads of a ranking do and look at
``description``   the same in a sentence, from the numbers
``draws``         random heads to compare with
``impact``        Head Impact: overlap of what heads look at with the object; layers ranked by it
``localisation``  localisation heads: attention on the image that falls on one spot
"""
