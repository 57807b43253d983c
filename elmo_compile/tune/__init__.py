"""Tiles for a head by time, on the device that will run it: what `elmo-compile tune` does.

Nothing calls this but the command line and the benchmarks: a training step never tunes.
"""

from elmo_compile.tune.run import Result, candidates_of, key_of, summary, tune
from elmo_compile.tune.search import Trial

__all__ = ["Result", "Trial", "candidates_of", "key_of", "summary", "tune"]
