"""The tuner on Triton's kernels, in the interpreter, by times that are made up."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from elmo_compile import bench, kernels, tune
from elmo_compile.errors import OptionError
from elmo_compile.kernels import triton as family
from elmo_compile.kernels.triton import configs
from elmo_compile.kernels.triton.configs import Tile
from elmo_compile.kernels.triton.storage import INTERPRETED
from elmo_compile.numerics.losses import BCE, CE

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the kernels are bound to a GPU")

BF16, FP8, FP32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
OWN = Tile(16, 32, 32, 1, 1)
GOOD, BAD = Tile(16, 16, 16, 1, 1), Tile(16, 64, 32, 1, 1)


@pytest.fixture(autouse=True)
def _triton_on_the_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "select", lambda device: family)


def case(loss=BCE, dtype=BF16, **more):
    return bench.Case(rows=5, features=20, outputs=40, dtype=dtype, loss=loss, **more)


def by_tile(seconds):
    """A timer that answers by the tiles in use."""

    def timer(step):
        tiles = configs.tiles_for(configs.INTERPRETER, BF16)
        return seconds.get(tiles.logits, 1.0) * seconds.get(tiles.features, 1.0)

    return timer


@pytest.mark.parametrize(
    ("loss", "dtype", "state"),
    [(BCE, FP8, "none"), (CE, BF16, "kahan"), (CE, FP32, "moments")],
)
def test_faster_tiles_with_the_same_results_are_kept(loss, dtype, state):
    trials = []
    result = tune.tune(
        case(loss, dtype), state=state, told=trials.append, timer=by_tile({GOOD: 0.5, BAD: 3.0}),
        listed={"logits": [OWN, BAD, GOOD], "features": [OWN, GOOD]},
    )  # fmt: skip
    assert [t.failed for t in trials if t.failed] == []
    assert {field: one.tile for field, one in result.kept.items()} == {
        "logits": GOOD, "features": GOOD,
    }  # fmt: skip
    assert result.table == {"logits": OWN, "features": OWN}
    assert (result.before, result.after) == (1.0, 0.25)
    assert result.key == (4 if dtype == FP32 else 2, dtype.itemsize, 16, 20)


@pytest.mark.parametrize("what", ["dx_ND", "rows_N", "weights"])
def test_a_tile_with_other_results_is_not_kept(monkeypatch, what):
    made = bench.fused_step

    def spoilt(problem, scale_N, chosen, update, *, value):
        result = made(problem, scale_N, chosen, update, value=value)
        if configs.tiles_for(configs.INTERPRETER, BF16).features == GOOD:
            if what == "weights":
                problem.w_LD[0] += 1
            else:
                result = result._replace(**{what: 1.01 * getattr(result, what)})
        return result

    monkeypatch.setattr(bench, "fused_step", spoilt)
    trials = []
    result = tune.tune(
        case(), told=trials.append, timer=by_tile({GOOD: 0.5}), listed={"features": [OWN, GOOD]}
    )
    assert result.kept["features"].tile == OWN
    (failed,) = [t.failed for t in trials if t.failed]
    assert failed.startswith("WrongResult: ")
    assert {"dx_ND": "dx", "rows_N": "losses", "weights": "weights"}[what] in failed


def test_a_tile_that_kernels_outside_the_step_cannot_run_by_is_given_up(monkeypatch):
    topk = family.topk

    def spoilt(*given):
        if configs.tiles_for(configs.INTERPRETER, BF16).logits_narrow == GOOD:
            raise RuntimeError("out of resources")
        return topk(*given)

    monkeypatch.setattr(family, "topk", spoilt)
    trials = []

    def timer(step):
        return 0.5 if configs.tiles_for(configs.INTERPRETER, BF16).logits_narrow == GOOD else 1.0

    result = tune.tune(
        case(), told=trials.append, timer=timer, listed={"logits_narrow": [OWN, GOOD]}
    )
    assert result.kept["logits_narrow"] == (OWN, 1.0, 1.0)
    assert (result.before, result.after) == (1.0, 1.0)
    (failed,) = [t.failed for t in trials if t.failed]
    assert failed == "outside the step: RuntimeError: out of resources"


def test_the_order_of_the_search():
    assert list(tune.candidates_of(case(BCE), "none", 90)) == [
        "logits_narrow", "features", "weights", "shared", "logits",
    ]  # fmt: skip
    assert list(tune.candidates_of(case(CE), "kahan", 90)) == [
        "logits", "features", "weights", "shared_with_state",
    ]  # fmt: skip


def test_a_head_that_does_not_fit_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(bench, "available_bytes", lambda device: 100)
    monkeypatch.setattr(bench, "problem_of", None)
    with pytest.raises(OptionError, match="tuning needs 8000 bytes on cpu"):
        tune.tune(case(), state="kahan", listed={})


def test_a_compensation_of_float32_weights_is_refused():
    with pytest.raises(OptionError, match="--state kahan"):
        tune.tune(case(dtype=FP32), state="kahan", listed={})


def test_whole_chunks_are_tuned():
    options = dataclasses.replace(case().options, chunk_size=16)
    result = tune.tune(case(options=options), listed={}, timer=lambda step: 1.0)
    assert result.tuned_for == f"{BCE}, state none, 32 outputs by 16"
    assert result.kept == {}
