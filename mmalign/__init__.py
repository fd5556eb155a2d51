"""Align image and video generators with preferences: sample, score (or label), train, score again.

The package is used through its command line, ``mmalign``, and through its modules: a loss is a function in
``mmalign.losses``, a job is a frozen schema in ``mmalign.jobs``, an evaluation dimension is a file in ``evaluators/``.
Importing ``mmalign`` alone loads nothing else, so that the command line starts at once.
"""

__version__ = "0.1.0"
