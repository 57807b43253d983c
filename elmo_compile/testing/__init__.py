"""Helpers to test heads with: shipped, so that users can test their own."""

from elmo_compile.testing.rewritten import assert_rewritten

__all__ = ["assert_rewritten"]
