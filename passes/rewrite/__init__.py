"""Rewrite: the only stage that edits a graph, and only its own copy."""

from elmo_compile.passes.rewrite.heads import rewrite

__all__ = ["rewrite"]
