"""Optimizers that own a head's weight and update it inside the backward of its loss."""

from elmo_compile.optim.sgd import SGD

__all__ = ["SGD"]
