"""Every error this package raises on purpose.

A message says what is wrong, what was given, what is accepted and what to do about it.
"""

from __future__ import annotations


class ElmoError(RuntimeError):
    """Base of every error raised by elmo_compile."""


class OptionError(ElmoError, ValueError):
    """An option, hyper-parameter or argument is unknown or out of its range."""


class InputError(ElmoError, ValueError):
    """A tensor handed to the head (features, targets, upstream gradient) cannot be used."""


class NotRewritten(ElmoError):
    """`Options(strict=True)` and a candidate head was left as it was."""


class StaleLogitsError(ElmoError):
    """The values of deferred logits were asked for after the weights they are made from changed."""


class FusedUpdateError(ElmoError):
    """A fused weight update was asked for where it would be wrong. Nothing was modified."""
