"""The command line: what it prints, and that a mistake is one line and exit code 2."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import types

import pytest
import torch

import elmo_compile
from elmo_compile import bench, cli
from elmo_compile.errors import OptionError
from elmo_compile.report import Report


def failed(capsys, *arguments) -> str:
    """The one line of a refused command."""
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("elmo-compile: ")
    return line


def test_env_names_versions_devices_and_the_backend(capsys):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    for expected in ("elmo-compile", torch.__version__, "triton", "last-level cache", "cuda"):
        assert expected in printed
    assert "tuned tiles       no device; kept in " in printed or torch.cuda.is_available()
    assert "registered as 'elmo' (elmo_compile.backend:elmo_backend)" in printed


@pytest.mark.parametrize("loss", ["bce", "ce"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_bench_times_every_contender(capsys, loss, dtype):
    sizes = ["-N", "4", "-D", "16", "-L", "300", "--rounds", "1", "--chunk-size", "128"]
    assert cli.main(["bench", *sizes, "--loss", loss, "--dtype", dtype]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "three bare products",
        bench.FUSED,
        bench.UNFUSED,
        bench.EAGER,
        "chunks of",
        "holds",
    ):
        assert expected in printed


@pytest.mark.parametrize(
    ("optimizer", "state_dtype", "state"),
    [
        ("momentum", None, {"momentum_buffer (bfloat16)": 2}),
        ("adamw", None, {"exp_avg (bfloat16)": 2, "exp_avg_sq (bfloat16)": 2}),
        ("adamw", "float32", {"exp_avg (float32)": 4, "exp_avg_sq (float32)": 4}),
    ],
)
def test_bench_holds_an_optimizer_s_state(capsys, optimizer, state_dtype, state):
    sizes = {"rows": 4, "features": 16, "outputs": 300, "rounds": 1}
    case = bench.Case(**sizes, optimizer=optimizer, state_dtype=state_dtype)
    result, bare = bench.run(case), bench.run(bench.Case(**sizes))
    assert len(result.timings) == 4
    terms = {t.name: t.bytes for t in result.plan.memory.after if t.name in state}
    assert terms == {name: each * 300 * 16 for name, each in state.items()}
    assert result.eager_bytes - bare.eager_bytes == 2 * len(state) * 300 * 16

    shown = ["--optimizer", optimizer, *(["--state-dtype", state_dtype] if state_dtype else [])]
    assert cli.main(["bench", "-N", "4", "-D", "16", "-L", "300", "--rounds", "1", *shown]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"the optimizer's {name} takes " in printed for name in state)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_bench_updates_as_the_optimizer_does(optimizer):
    case = bench.Case(rows=4, features=8, outputs=64, dtype=torch.float32, optimizer=optimizer)
    plan = bench.planned(case, fused=True)
    problem, scale_N = bench.problem_of(case, plan)
    weight = problem.w_LD.clone().requires_grad_()
    theirs = bench._TORCHS[optimizer]([weight], lr=bench.LR)
    ours = bench._optimizer(case, problem.w_LD).next_update(problem.w_LD)
    rows, columns = problem.target.rows_M, problem.target.cols_M
    for count in range(3):
        targets = torch.zeros(4, 64).index_put_((rows, columns), torch.ones(()))
        logits = problem.x_ND @ weight.t()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        (weight.grad,) = torch.autograd.grad(loss, weight)
        theirs.step()
        update = dataclasses.replace(ours, step=count)
        bench.fused_step(problem, scale_N, plan, update, value=True)
    torch.testing.assert_close(problem.w_LD, weight.detach(), rtol=1e-5, atol=1e-6)


def test_bench_leaves_out_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(bench, "available_bytes", lambda device: 10)
    result = bench.run(bench.Case(rows=2, features=8, outputs=64, rounds=1))
    assert [t.name for t in result.timings] == ["three bare products", bench.FUSED]
    assert all("needs" in sentence for sentence in result.skipped)
    assert len(result.skipped) == 2


def test_bench_steps_do_the_same_thing():
    case = bench.Case(rows=4, features=8, outputs=64, dtype=torch.float32, rounds=1)
    first = [bench._inputs(case, torch.float32) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*first))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype int8 cannot be used; accepted: float64"),
        (["--device", "gpu"], "--device gpu cannot be used"),
        (["--state-dtype", "float32"], "state_dtype cannot be used with optimizer='sgd'"),
        (["--rows", "0"], "rows=0 cannot be used; at least 1"),
        (["--threads", "0"], "--threads 0 cannot be used; at least 1"),
        (["--chunk-size", "0"], "chunk_size=0"),
        (["--memory-budget", "many"], "memory_budget='many'"),
        (["--memory-budget", "10B"], "set memory_budget to at least"),
    ],
)
def test_bench_refuses(capsys, arguments, message):
    assert message in failed(capsys, "bench", *arguments)


@pytest.mark.parametrize("busy", [False, True])
def test_bench_says_what_it_timed_and_beside_what(capsys, monkeypatch, busy):
    monkeypatch.setattr("os.getloadavg", lambda: (1.5 * busy, 0.0, 0.0))
    sizes = ["-N", "8", "-D", "16", "-L", "512", "--rounds", "1", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        assert cli.main(["bench", *sizes, "--dtype", "bf16"]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "bce, N=8 D=16 L=512, bfloat16, 1 thread; median of 1" in " ".join(printed.split())
    assert ("other work was running (load 1.5)" in printed) is busy


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp16", "fp32", "torch.bfloat16", "float64"])
def test_dtypes_by_their_short_names(name):
    full = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "fp16": "float16", "fp32": "float32"}
    assert str(cli._dtype(name)) == f"torch.{full.get(name, name.removeprefix('torch.'))}"


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("elmo-compile")


def test_bench_refuses_a_device_that_is_not_there(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert "no CUDA device" in failed(capsys, "bench", "--device", "cuda")


def test_bench_refuses_an_unknown_device_kind():
    with pytest.raises(OptionError, match="'meta'"):
        bench.run(bench.Case(rows=1, features=1, outputs=1, device="meta"))


def test_tune_lists_what_it_would_time(capsys):
    arguments = ["tune", "--list", "--chip", "90", "--dtype", "float8_e4m3fn", "-N", "100"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "for sm_90: up to 128 rows of 768 features" in printed
    assert "weights of 8 bits, products of 16" in printed
    assert "features: gradient of the features" in printed
    assert printed.count("the table's") == 5  # the table's tile of each product
    assert "shared_with_state" not in printed
    assert "no such pass" in printed
    assert "256 accumulators a thread" in printed
    assert "to time," in printed
    assert cli.main([*arguments, "--loss", "ce", "--state", "kahan"]) == 0
    printed = capsys.readouterr().out
    assert "shared_with_state" in printed
    assert "logits_narrow" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "90"], "accepted with --list only"),
        (["--list", "--chip", "75"], "--chip 75 is not known; accepted: 80, 89"),
        (["--device", "cpu"], "--device cpu cannot be tuned; accepted: cuda"),
        (["--list", "--chip", "90", "--dtype", "float64"], "--dtype float64 cannot be tuned"),
        (["--list", "--chip", "90", "--rows", "0"], "rows=0 cannot be used"),
    ],
)
def test_tune_refuses(capsys, arguments, message):
    assert message in failed(capsys, "tune", *arguments)


def test_tune_needs_a_device(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    for arguments in ([], ["--list"]):
        assert "no CUDA device" in failed(capsys, "tune", *arguments)


def test_tune_needs_triton(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_version", lambda package: "not installed")
    assert "pip install" in failed(capsys, "tune", "--list", "--chip", "90")
    assert cli.main(["env"]) == 0
    assert "none, without triton" in capsys.readouterr().out


@pytest.fixture
def program(monkeypatch):
    """A module `users_program` with good and bad factories."""
    module = types.ModuleType("users_program")
    module.good = lambda: (torch.add, (1, 2))
    module.named = lambda: (torch.add, [1], {"other": 2})
    module.wrong = lambda: 3
    module.worse = lambda: (torch.add, 1)
    monkeypatch.setitem(sys.modules, "users_program", module)
    return module


@pytest.mark.parametrize(
    ("name", "args", "kwargs"), [("good", (1, 2), {}), ("named", (1,), {"other": 2})]
)
def test_explain_hands_over_the_program(capsys, monkeypatch, tmp_path, program, name, args, kwargs):
    calls = []

    def explain(fn, *args, **kwargs):
        calls.append((fn, args, kwargs))
        return Report()

    monkeypatch.setattr(elmo_compile, "explain", explain, raising=False)
    folder = tmp_path / "dumped"
    assert cli.main(["explain", f"users_program:{name}", "--dump", str(folder)]) == 0
    assert calls == [(torch.add, args, kwargs)]
    assert "0 heads rewritten" in capsys.readouterr().out
    assert (folder / "report.txt").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("users_program", "accepted: MODULE:CALLABLE"),
        ("no_such_module:f", "cannot be imported: No module named 'no_such_module'"),
        ("users_program:missing", "cannot be imported"),
        ("users_program:wrong", "returned int; accepted"),
        ("users_program:worse", "args must be a tuple"),
    ],
)
def test_explain_refuses(capsys, monkeypatch, program, target, message):
    monkeypatch.setattr(elmo_compile, "explain", None, raising=False)
    path = list(sys.path)
    assert message in failed(capsys, "explain", target)
    assert sys.path == path


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
