"""Training heads on several processes."""

from elmo_compile.distributed.data_parallel import ignore_heads

__all__ = ["ignore_heads"]
