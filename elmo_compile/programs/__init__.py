"""Losses of any kind over a head's logits, as programs evaluated chunk by chunk of outputs.

A program is the graph between a head's logits and the first values that are no longer huge. It is
traced to functional ATen together with its gradient (`trace`), simplified (`simplify`), every value
is told to be huge or not (`extent`), and the reductions over the outputs are put into as few walks
over the chunks as their dependences allow (`schedule`). `run` evaluates walks.

Shapes: N rows (any leading dimensions), L outputs, C outputs of a chunk.
"""

from elmo_compile.programs.record import Program, Schedule, Unsupported, find, register

__all__ = ["Program", "Schedule", "Unsupported", "find", "register"]
