"""Random courses of training, against the same course in eager torch with torch.optim.

ELMO_COURSES says how many are drawn.

A course is what people do to a model in a notebook, in any order: losses inside and outside of the
compiled function, several of them before a step, steps, evaluations, logits that are held and read
later, frozen layers, hooks, weights that are written or swapped, checkpoints, wrong inputs. After
every event either all weights, gradients and values are eager's, or the event was refused by an
error that this package raises on purpose, and nothing has changed.
"""

from __future__ import annotations

import os
from typing import Any

from courses import LABELS, LOSSES, READINGS, Over, Setup, World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BOTH = st.booleans()
WAYS = st.sampled_from(["inside", "outside", "both"])
KINDS, SEEDS = st.sampled_from(sorted(LOSSES)), st.integers(0, 5)
event = st.one_of(
    st.tuples(st.just("train"), WAYS, KINDS, SEEDS, st.sampled_from([1.0, 0.25]), BOTH),
    st.tuples(st.just("train"), WAYS, KINDS, SEEDS, st.sampled_from([1.0, 0.25]), BOTH),
    st.tuples(st.just("step"), BOTH, BOTH),
    st.tuples(st.just("step"), BOTH, BOTH),
    st.tuples(st.just("zero"), BOTH),
    st.tuples(st.just("copied"), SEEDS),
    st.tuples(st.just("twice"), WAYS, KINDS, SEEDS),
    st.tuples(st.just("scaled"), WAYS, KINDS, SEEDS),
    st.tuples(st.just("evaluate"), WAYS, KINDS, SEEDS),
    st.tuples(st.just("discard"), WAYS, KINDS, SEEDS),
    st.tuples(st.just("hold"), SEEDS, BOTH),
    st.tuples(st.just("read"), SEEDS, st.sampled_from(sorted(READINGS))),
    st.tuples(st.just("read"), SEEDS, st.sampled_from(sorted(READINGS))),
    st.tuples(st.just("train_on_held"), SEEDS, KINDS),
    st.tuples(st.just("keep"), WAYS, KINDS, SEEDS),
    st.tuples(st.just("ask"), SEEDS, BOTH),
    st.tuples(st.just("perturb"), st.sampled_from(["decay", "row", "data", "swap", "load"])),
    st.tuples(st.just("freeze"), st.sampled_from(["head", "encoder"]), BOTH),
    st.tuples(st.just("rate"), st.sampled_from([0.5, 1.5])),
    st.tuples(st.just("checkpoint"), BOTH),
    st.tuples(st.just("wrong"), WAYS, KINDS, SEEDS),
    st.tuples(st.just("encoder_first"), WAYS, KINDS, SEEDS),
    st.tuples(st.just("several"), WAYS, KINDS, SEEDS),
    st.tuples(st.just("penalty"), SEEDS),
    st.tuples(st.just("hook"), SEEDS),
)
setups = st.builds(
    Setup,
    rule=st.sampled_from(["sgd", "momentum", "adamw"]),
    update_at=st.sampled_from(["backward", "step"]),
    max_norm=st.sampled_from([None, 0.5]),
    bias=BOTH,
    chunk=st.sampled_from([7, 16, LABELS]),
    loss_value=st.sampled_from(["auto", "exact"]),
    deferred=st.sampled_from(["auto", True, False]),
    budget=st.sampled_from([None, "1KiB"]),
    owner=st.sampled_from(["elmo", "elmo", "torch"]),
)


def run(setup: Setup, events: list[tuple[Any, ...]]) -> None:
    world = World(setup)
    for number, (name, *arguments) in enumerate(events):
        try:
            getattr(world, name)(*arguments)
            if not (world.ahead):
                world.check()
        except Over:
            return
        except Exception as error:
            error.add_note(f"event {number}: {name}{tuple(arguments)} of {events}\n{setup}")
            raise


@settings(
    max_examples=int(os.environ.get("ELMO_COURSES", "20")),
    deadline=None,
    derandomize="ELMO_COURSES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(setups, st.lists(event, min_size=4, max_size=16))
def test_courses_are_eagers(setup: Setup, events: list[tuple[Any, ...]]) -> None:
    run(setup, events)
