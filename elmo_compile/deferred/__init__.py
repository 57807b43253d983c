"""Deferred logits: tensors that know how they are made, and are made if something needs them.

A graph whose logits leave it returns `Deferred` tensors. Losses and metrics of them stream through
the backend; casts, views and slices of rows stay deferred; everything else makes the values, once.
"""

from elmo_compile.deferred.origin import Origin
from elmo_compile.deferred.tensor import Deferred

__all__ = ["Deferred", "Origin"]
