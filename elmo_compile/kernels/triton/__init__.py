"""Triton kernels for CUDA (sm_80 and newer), and for CPU tensors in Triton's interpreter.

Importing this package imports Triton, and fixes interpreter or compiler by TRITON_INTERPRET.
"""

from elmo_compile.kernels.triton.head import (
    backward,
    backward_update,
    forward,
    head_chunks,
    loss_and_gradients,
)
from elmo_compile.kernels.triton.scale import scale_
from elmo_compile.kernels.triton.topk import topk

__all__ = [
    "backward",
    "backward_update",
    "forward",
    "head_chunks",
    "loss_and_gradients",
    "scale_",
    "topk",
]
