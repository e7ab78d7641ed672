"""Evidence and reports: from a claim's verdict inside pytest to one page a reader can doubt.

``plugin``        the pytest adapter: options, marker, fixtures, hooks (thin)
``options``       the ``--claims-*`` options, checked once
``claims``        which collected tests are which claim instances; family sizes
``expectations``  known outcomes of a subject, turned into strict xfails
``evidence``      what a claim test talks to; the verdict exceptions
``record``        the evidence record: builtins only, checked against its published schema
``collect``       the controller's side: gather, gate, write the run directory
``provenance``    commit, versions, machine, memory; by what two runs are of the same subject, data and platform
``effects``       the effects per item behind a verdict, kept by content
``nights``        the two nightly lanes of a session, what they keep, and the page of a history
``terminal``      live progress and the verdict table
``exhibits``      from measured tables to the tables and figures that tests leave
``figures``       the figure kinds and their data, rendered from JSON as SVG (``drawings``) or as words (a template)
``pictures``      small pictures as text
``wording``       numbers and lists as a reader wants them
``summary``       what the page says, derived from the JSON
``scale``         the axis that a claim's instances share
``literature``    the works whose claims are tested, and what of each
``paper``         a paper of a few pages
``page``          the page itself; ``python -m reports render RUN`` draws it again
``shards``        the parts of one subject's runs put together; ``models`` many subjects on one page
``compare``       two runs beside each other; ``index`` the runs of a directory; ``markdown`` a run for a job

Nothing here measures: verdicts come from ``vlm_core.stats``, numbers from the tests.
"""
