"""Match: what a retraced region means. Rules are named by meaning and listed in `matcher.py`."""

from elmo_compile.passes.match.matcher import match_region

__all__ = ["match_region"]
