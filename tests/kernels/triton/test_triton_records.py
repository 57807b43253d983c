"""Records of updates: made on the device they are those made on the host, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from elmo_compile.kernels.triton.records import RECORD, records
from elmo_compile.numerics.philox import counter_words
from elmo_compile.numerics.update import Update

UPDATES = {
    "sgd": Update(lr=0.1, beta1=0.9, weight_decay=0.01, seed=2**32 - 1, param_id=7),
    "no rate": Update(lr=0.0, beta1=0.9, eco=True),
    "eco": Update(lr=3e-4, beta1=0.9, eco=True, param_id=2**31),
    "adamw": Update(rule="adamw", lr=1e-3, beta1=0.9, beta2=0.999, debias=True, eps=1e-8),
    "adamw, shared rate": Update(
        rule="adamw", lr=1e-3, lr_share=3, beta1=0.95, beta2=0.99, debias=True, eco=True
    ),
    "no first moment": Update(rule="adamw", lr=1e-3, beta1=0.0, beta2=0.5, debias=True),
    "lion": Update(rule="lion", lr=1e-4, beta1=0.9, beta2=0.99),
}
STEPS = [0, 1, 2, 9, 999, 12_345, 10**6, 2**31, 2**33 + 5]


def on_device(update: Update) -> Update:
    """The same with rate and step where kernels read them."""
    lr = torch.tensor(update.lr, dtype=torch.float64)
    return dataclasses.replace(update, lr=lr, step=torch.tensor(update.step))


@pytest.mark.parametrize("name", UPDATES)
def test_records_of_the_device_are_those_of_the_host(name):
    updates = [dataclasses.replace(UPDATES[name], step=step) for step in STEPS]
    want = records(updates, torch.device("cpu"))
    assert want.shape == (len(STEPS), RECORD)
    got = records([on_device(update) for update in updates], torch.device("cpu"))
    assert torch.equal(got, want)
    # Some of both in one launch.
    mixed = [on_device(u) if i % 2 else u for i, u in enumerate(updates)]
    assert torch.equal(records(mixed, torch.device("cpu")), want)


def test_what_a_record_holds():
    update = dataclasses.replace(UPDATES["adamw"], step=2**33 + 5, seed=2**32 - 1)
    (record,) = records([update], torch.device("cpu"))
    words = [word % 2**32 for word in record[:4].tolist()]
    assert words == list(counter_words(update.seed, update.param_id, update.step, 0))
    r = update.rates
    numbers = [r.lr, r.weight_decay, r.beta1, r.beta2, 1 - r.beta1, 1 - r.beta2, r.eps, r.error]
    assert torch.equal(record[4:].view(torch.float32), torch.tensor(numbers))


def test_the_rate_is_read_when_the_record_is_made():
    update = on_device(dataclasses.replace(UPDATES["adamw"], step=3))
    update.lr.fill_(0.5)
    update.step.add_(1)
    want = dataclasses.replace(UPDATES["adamw"], lr=0.5, step=4)
    device = torch.device("cpu")
    assert torch.equal(records([update], device), records([want], device))
    assert dataclasses.replace(update.on_host(), step=4, lr=0.5) == want
    with pytest.raises(AssertionError, match="on_host"):
        update.rates  # noqa: B018
