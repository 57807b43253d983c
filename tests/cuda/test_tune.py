"""`elmo-compile tune` from the command line to the step that runs by what it wrote."""

from __future__ import annotations

import json

import pytest
import torch
from steps import net, on_device
from training import compiled

import elmo_compile as elmo
from elmo_compile import bench, cli
from elmo_compile.kernels.triton import launch, tuned
from elmo_compile.kernels.triton.candidates import Candidate, HeadKey
from elmo_compile.kernels.triton.configs import Tile, chip_of
from elmo_compile.tune import run
from elmo_compile.tune.command import tune_and_save

D, L, N = 32, 520, 10
SMALL = Tile(16, 64, 32, 4, 2)
HERE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("ELMO_COMPILE_CACHE_DIR", str(tmp_path))
    tuned.forget()
    yield
    tuned.forget()


def test_a_run_writes_what_the_next_step_takes(monkeypatch, capsys):
    def few(field, key, chip):
        own = getattr(key.table(chip), field)
        return [Candidate(own), Candidate(SMALL)] if field == "logits" else [Candidate(own)]

    monkeypatch.setattr("elmo_compile.kernels.triton.candidates.candidates", few)
    seconds = iter([2.0, 1.0, 2.0, 2.0, 1.0])  # both, the table's again, the step before and after
    monkeypatch.setattr(run, "median_seconds", lambda step, device: next(seconds))
    sizes = ["-N", str(N), "-D", str(D), "-L", str(L), "--dtype", "float32", "--loss", "ce"]
    assert cli.main(["tune", *sizes]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2/2 logits 16 x 64 x 32, 4 warps, 2 stages: 1000 ms" in printed
    assert "50 %" in printed
    assert "a step takes 1000 ms instead of 2000 ms" in printed
    (entry,) = json.loads(tuned.file_of(HERE).read_text())["entries"]
    assert entry["tiles"] == {"logits": SMALL._asdict()}
    assert cli.main(["env"]) == 0
    assert "1 heads for" in capsys.readouterr().out

    by_tuned, taken = trained(monkeypatch)
    assert taken == {SMALL}
    monkeypatch.setenv("ELMO_COMPILE_TUNED", "0")
    tuned.forget()
    by_table, taken = trained(monkeypatch)
    assert taken == {None}
    for name, value in by_tuned.items():
        torch.testing.assert_close(value, by_table[name], rtol=1e-5, atol=1e-6)


def trained(monkeypatch):
    """A model's parameters after two steps, and the tuned tiles its kernels took."""
    taken = set()

    def spied(p, chip):
        found = tuned.tuned_tiles(p, chip)
        taken.add(found.get("logits"))
        return found

    monkeypatch.setattr(launch, "tuned_tiles", spied)
    model = net("ce").to("cuda")
    step = compiled(model, {"min_outputs": 256, "lower": "eager"})
    opt = elmo.optim.SGD(model.parameters(), 0.5)
    for seed in range(2):
        step(*on_device(seed)).backward()
        opt.step()
    return model.state_dict(), taken


@pytest.mark.slow
def test_the_real_clock_and_every_candidate_of_a_tiny_list():
    """No time is made up: whatever wins, the entry is one that can be read."""
    case = bench.Case(rows=4, features=16, outputs=64, loss="cross_entropy", device="cuda")
    chip, _ = chip_of(HERE)
    own = HeadKey.of(4, 16, torch.bfloat16, torch.bfloat16).table(chip).logits
    tune_and_save(case, "none", {"logits": [own, Tile(16, 32, 16, 4, 2)]})
    found, others = tuned.read(tuned.file_of(HERE), chip)
    assert others == 0
    (tiles,) = found.values()
    assert tiles["logits"] in (own, Tile(16, 32, 16, 4, 2))
