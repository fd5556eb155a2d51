"""For tests, this project's and those of plug-ins: `check_evaluator` tries whether an evaluator keeps its contract.

`mmalign.testing.tiny` makes small real pipelines; it is not imported here, because it loads diffusers.
"""

from mmalign.testing.evaluators import check_evaluator

__all__ = ["check_evaluator"]
