"""Training heads on several processes."""

from elmo_compile.distributed.data_parallel import ignore_heads
from elmo_compile.distributed.label_parallel import shard_head, unshard_head

__all__ = ["ignore_heads", "shard_head", "unshard_head"]
