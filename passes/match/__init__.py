"""Match: what a retraced region means. Rules are named by meaning and listed in `matcher.py`."""

from elmo_compile.passes.match.matcher import match_region
from elmo_compile.passes.match.programs import match_program

__all__ = ["match_program", "match_region"]
