"""The search on made-up times: what is kept, in which order, and what failing leads to."""

from __future__ import annotations

import pytest

from elmo_compile.tune.search import Trial, search

OWN, FAST, SLOW, NONE = "own", "fast", "slow", None


class Clock:
    """Times by tile; remembers what was asked for."""

    def __init__(self, **seconds):
        self.seconds = seconds
        self.asked = []

    def __call__(self, field, fields):
        self.asked.append((field, dict(fields)))
        found = self.seconds[fields[field] or "none"]
        found = found.pop(0) if isinstance(found, list) else found
        if isinstance(found, Exception):
            raise found
        return found


def kept(listed, clock, told=lambda trial: None):
    return {field: one.tile for field, one in search(listed, clock, told).items()}


def test_the_fastest_is_kept_with_what_it_gained():
    (found,) = search(
        {"logits": [OWN, SLOW, FAST]}, Clock(own=1.0, fast=0.5, slow=2.0), print
    ).values()
    assert found == (FAST, 0.5, 1.0)


@pytest.mark.parametrize(("seconds", "wanted"), [(0.99, OWN), (0.981, OWN), (0.979, FAST)])
def test_the_tables_is_kept_within_noise(seconds, wanted):
    assert kept({"logits": [OWN, FAST]}, Clock(own=1.0, fast=seconds)) == {"logits": wanted}


def test_a_clock_that_rises_during_the_search_gains_nothing():
    clock = Clock(own=[1.0, 0.5], fast=0.5, slow=0.7)
    assert kept({"logits": [OWN, SLOW, FAST]}, clock) == {"logits": OWN}


def test_the_best_of_one_field_is_kept_for_the_next_and_the_shared_pass_waits():
    listed = {"features": [OWN, FAST], "shared": [OWN, NONE], "logits": [OWN, SLOW]}
    clock = Clock(own=1.0, fast=0.5, slow=2.0, none=3.0)
    assert kept(listed, clock) == {"features": FAST, "shared": OWN, "logits": OWN}
    asked = [fields for field, fields in clock.asked if field == "features"]
    assert all(fields["shared"] is None for fields in asked)
    asked = [fields for field, fields in clock.asked if field == "logits"]
    assert all((fields["features"], fields["shared"]) == (FAST, OWN) for fields in asked)


def test_a_field_with_nothing_to_choose_is_not_timed():
    clock = Clock(own=1.0)
    assert kept({"shared": [OWN], "logits": []}, clock) == {}
    assert clock.asked == []


def test_what_fails_is_told_and_left_out():
    trials = []
    clock = Clock(own=1.0, slow=RuntimeError("out of resources: shared memory\nand more"), fast=0.5)
    assert kept({"logits": [OWN, SLOW, FAST]}, clock, trials.append) == {"logits": FAST}
    before, after = (t for t in trials if t.tile == SLOW)
    assert (before.seconds, before.failed) == (None, None)
    assert after == Trial(
        field="logits", tile=SLOW, number=2, of=3,
        failed="RuntimeError: out of resources: shared memory",
    )  # fmt: skip


def test_a_tables_tile_that_fails_is_replaced_by_any_that_runs():
    assert kept({"logits": [OWN, SLOW]}, Clock(own=ValueError(), slow=9.0)) == {"logits": SLOW}


def test_where_nothing_runs_the_tables_tile_stays():
    clock = Clock(own=ValueError(), slow=ValueError())
    assert kept({"logits": [OWN, SLOW]}, clock) == {"logits": OWN}


def test_an_interrupt_ends_the_search():
    with pytest.raises(KeyboardInterrupt):
        search({"logits": [OWN, FAST]}, _interrupted, lambda trial: None)


def _interrupted(field, fields):
    raise KeyboardInterrupt
