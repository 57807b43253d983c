"""Optimizers that own a head's weight and update it without a gradient."""

from elmo_compile.optim.rules import SGD, Adagrad, AdamW, Lion

__all__ = ["SGD", "Adagrad", "AdamW", "Lion"]
