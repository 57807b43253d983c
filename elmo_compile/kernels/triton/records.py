"""The numbers of updates as kernels read them: one record each, on the device.

A record is 12 int32: Philox's seed, parameter, step_lo and stream_step_hi (`CounterWords` of stream
0), then the bits of 8 float32: lr, weight_decay, beta1, beta2, 1 - beta1, 1 - beta2, eps, error
(`Rates`). Of an update on the host it is a copy; where rate and step are the device's, a kernel
makes it from them, so that a CUDA graph's replays make their own.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from elmo_compile.numerics.capture import capturing
from elmo_compile.numerics.philox import WEIGHT, check_int, counter_words
from elmo_compile.numerics.update import Update

RECORD = 12
"""int32 numbers in a record."""
_STAGED = 1 << 16
"""Bytes that the driver copies away before it returns."""
_SPEC = 11
"""int64 numbers that `_records_kernel` makes a record of."""


@triton.jit
def word(record_ptr, NUMBER: tl.constexpr):
    """One of the four words, int32."""
    return tl.load(record_ptr + NUMBER)


@triton.jit
def rate(record_ptr, NUMBER: tl.constexpr):
    """One of the eight rates, float32."""
    return tl.load(record_ptr + 4 + NUMBER).to(tl.float32, bitcast=True)


@triton.jit
def rates(record_ptr):
    """All eight; loads of what is not used are left out by the compiler."""
    return (
        rate(record_ptr, 0), rate(record_ptr, 1), rate(record_ptr, 2), rate(record_ptr, 3),
        rate(record_ptr, 4), rate(record_ptr, 5), rate(record_ptr, 6), rate(record_ptr, 7),
    )  # fmt: skip


def records(updates: Sequence[Update], device: torch.device) -> Tensor:
    """int32 [T, 12]: a record for each update.

    Raises:
        OptionError: a seed, parameter or step out of its range.
    """
    if not any(update.on_device for update in updates):
        packed = b"".join(map(_packed, updates))
        table = torch.frombuffer(bytearray(packed), dtype=torch.int32)
        return _sent(table.view(-1, RECORD), device)
    held: list[Tensor] = []
    spec = [number for update in updates for number in _spec(update, device, held)]
    made = torch.empty((len(updates), RECORD), dtype=torch.int32, device=device)
    block = 32
    _records_kernel[(-(-len(updates) // block),)](
        made, numbers(spec, device), len(updates), RECORD=RECORD, SPEC=_SPEC, BLOCK=block,
        num_warps=1,
    )  # fmt: skip
    return made


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """A table on the device. CUDA copies more than 64 KiB of pageable memory only once all that is
    queued before has run, and the host waits; not from pinned memory."""
    if device.type == "cuda" and table.nbytes > _STAGED:
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def _packed(update: Update) -> bytes:
    r = update.rates
    words = counter_words(update.seed, update.param_id, int(update.step), WEIGHT)
    rest1, rest2 = 1.0 - r.beta1, 1.0 - r.beta2
    return struct.pack(
        "=4I8f", *words, r.lr, r.weight_decay, r.beta1, r.beta2, rest1, rest2, r.eps, r.error
    )


def _spec(update: Update, device: torch.device, held: list[Tensor]) -> list[int]:
    """What a record is made of; `held` keeps tensors alive that were made for it."""

    def address(value: float | Tensor, dtype: torch.dtype) -> int:
        if not isinstance(value, Tensor):
            held.append(torch.full((), value, dtype=dtype, device=device))
            value = held[-1]
        assert value.dtype == dtype
        assert value.device == device
        return value.data_ptr()

    return [
        address(update.lr, torch.float64),
        address(update.step, torch.int64),
        check_int("seed", update.seed, 32),
        check_int("param_id", update.param_id, 32),
        update.lr_share,
        int(update.debias),
        _bits(update.weight_decay),
        _bits(update.beta1),
        _bits(update.beta2),
        _bits(update.eps),
        _bits(1.0 - 1.0 / update.beta1 if update.eco else 0.0),
    ]


def _bits(value: float) -> int:
    """A float64 as the int64 with the same bits."""
    found: int = struct.unpack("=q", struct.pack("=d", value))[0]
    return found


@triton.jit
def _number(spec_ptr, tensors, real, FIELD: tl.constexpr, SPEC: tl.constexpr):
    return tl.load(spec_ptr + tensors * SPEC + FIELD, mask=real, other=0)


@triton.jit
def _float(spec_ptr, tensors, real, FIELD: tl.constexpr, SPEC: tl.constexpr):
    return _number(spec_ptr, tensors, real, FIELD, SPEC).to(tl.float64, bitcast=True)


@triton.jit
def _debiased(beta, t):
    """`numerics.update.debiased`, with beta^t by squaring; t below 2^40."""
    power = beta * 0.0 + 1.0
    square = beta
    for _ in range(40):
        power = tl.where((t & 1) == 1, power * square, power)
        square = square * square
        t = t >> 1
    return (power - beta) / (power - 1.0)


@triton.jit
def _put(record_ptr, at, real, NUMBER: tl.constexpr, value):
    """Store a float64 rate as the bits of a float32."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    tl.store(record_ptr + at + 4 + NUMBER, bits, mask=real)


@triton.jit
def _records_kernel(
    record_ptr, spec_ptr, T, RECORD: tl.constexpr, SPEC: tl.constexpr, BLOCK: tl.constexpr
):
    """record[t] from spec[t] (`_spec`) and what its two addresses hold now. Arithmetic: float64."""
    tensors = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = tensors < T
    at = tensors * RECORD
    lr_ptr = _number(spec_ptr, tensors, real, 0, SPEC).to(tl.pointer_type(tl.float64))
    step_ptr = _number(spec_ptr, tensors, real, 1, SPEC).to(tl.pointer_type(tl.int64))
    lr = tl.load(lr_ptr, mask=real, other=0.0)
    step = tl.load(step_ptr, mask=real, other=0)
    seed = _number(spec_ptr, tensors, real, 2, SPEC)
    param = _number(spec_ptr, tensors, real, 3, SPEC)
    tl.store(record_ptr + at, seed.to(tl.int32), mask=real)
    tl.store(record_ptr + at + 1, param.to(tl.int32), mask=real)
    tl.store(record_ptr + at + 2, step.to(tl.int32), mask=real)
    tl.store(record_ptr + at + 3, (step >> 32).to(tl.int32), mask=real)
    lr = lr / tl.maximum(_number(spec_ptr, tensors, real, 4, SPEC), 1).to(tl.float64)
    debias = _number(spec_ptr, tensors, real, 5, SPEC) != 0
    beta1 = _float(spec_ptr, tensors, real, 7, SPEC)
    beta2 = _float(spec_ptr, tensors, real, 8, SPEC)
    beta1 = tl.where(debias, _debiased(tl.where(debias, beta1, 0.0), step + 1), beta1)
    beta2 = tl.where(debias, _debiased(tl.where(debias, beta2, 0.0), step + 1), beta2)
    error = _float(spec_ptr, tensors, real, 10, SPEC) / tl.where(lr == 0, 1.0, lr)
    _put(record_ptr, at, real, 0, lr)
    _put(record_ptr, at, real, 1, _float(spec_ptr, tensors, real, 6, SPEC))
    _put(record_ptr, at, real, 2, beta1)
    _put(record_ptr, at, real, 3, beta2)
    _put(record_ptr, at, real, 4, 1.0 - beta1)
    _put(record_ptr, at, real, 5, 1.0 - beta2)
    _put(record_ptr, at, real, 6, _float(spec_ptr, tensors, real, 9, SPEC))
    _put(record_ptr, at, real, 7, tl.where(lr == 0, 0.0, error))


def numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 numbers on the device.

    In a CUDA graph they are arguments of its kernels (`torch._foreach_add_`, tried on 2.13): a
    replayed copy would read host memory that is no longer theirs.
    """
    if not capturing(device):
        return _sent(torch.tensor(values, dtype=torch.int64, device="cpu"), device)
    made = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(list(made.unbind()), list(values))
    return made
