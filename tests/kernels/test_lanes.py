"""bf16 and fp8 as 32-bit words: every code there and back."""

from __future__ import annotations

import torch

from elmo_compile.kernels.aten import decode, lanes


def test_every_e4m3_code() -> None:
    codes = torch.arange(256, dtype=torch.int32)
    values = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    decoded = lanes.e4m3_bits(codes).view(torch.float32)
    assert torch.equal(decoded.nan_to_num(1e9), values.nan_to_num(1e9))
    assert torch.equal(decoded.signbit(), values.signbit())


def test_every_bf16_word() -> None:
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    pairs = words.view(torch.int32)
    even, odd = lanes.unpack_bf16(pairs)
    expected = words.view(torch.bfloat16).float().view(-1, 2)
    assert torch.equal(even.nan_to_num(1), expected[:, 0].nan_to_num(1))
    assert torch.equal(odd.nan_to_num(1), expected[:, 1].nan_to_num(1))
    assert torch.equal(lanes.pack_bf16(even.view(torch.int32), odd.view(torch.int32)), pairs)


def test_rounding_to_bf16_is_the_cast() -> None:
    torch.manual_seed(0)
    v = torch.cat((
        torch.randn(10_000) * torch.logspace(-44, 38, 10_000, dtype=torch.float64).float(),
        torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38]),
    ))  # fmt: skip
    even = lanes.pack_bf16(lanes.bf16_bits(v), torch.zeros_like(v, dtype=torch.int32))
    got = even.to(torch.int16).view(torch.bfloat16)
    assert torch.equal(got.float().nan_to_num(7), v.bfloat16().float().nan_to_num(7))


def test_decoded_quads_are_the_columns_in_their_order() -> None:
    torch.manual_seed(0)
    stored = torch.randint(0, 256, (5, 24), dtype=torch.uint8).view(torch.float8_e4m3fn)
    out = torch.empty(5, 24, dtype=torch.bfloat16)
    decode.quads_(lanes.as_words(out), lanes.as_words(stored))
    order = lanes.halves_order(24, torch.device("cpu"))
    assert sorted(order.tolist()) == list(range(24))
    expected = stored.float()[:, order]
    assert torch.equal(out.float().nan_to_num(7), expected.nan_to_num(7))
    decode.table_(out, stored)
    assert torch.equal(out.float().nan_to_num(7), stored.float().nan_to_num(7))
