"""Options: what is accepted, what is refused, and what a refusal says."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch

from elmo_compile import config
from elmo_compile.config import Options, parse_bytes
from elmo_compile.errors import OptionError


def test_defaults_are_valid_and_frozen():
    options = Options()
    assert options.min_outputs == 16384
    assert options.memory_budget is None
    assert options.lower == "inductor"
    assert options.loss_value == "auto"
    assert options.deferred_logits == "auto"
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.strict = True  # type: ignore[misc]
    with pytest.raises(TypeError):
        Options(1)  # type: ignore[misc]


def test_help_explains_every_field():
    text = inspect.getdoc(Options)
    for field in dataclasses.fields(Options):
        assert f"    {field.name} (" in text
    assert "A head with fewer outputs (last dimension of the logits) is left alone" in text


def test_every_field_says_what_it_is():
    body = inspect.getsource(config).split("class Options")[1].split("def __post_init__")[0]
    for field in dataclasses.fields(Options):
        declaration = body.index(f"\n    {field.name}: ")
        following = body.index("\n", declaration + 1) + 1
        assert body[following:].lstrip().startswith('"""'), field.name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, 1),
        (123456, 123456),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("300MB", 300_000_000),
        ("2 kib", 2048),
        ("10B", 10),
        ("4096", 4096),
        ("1TiB", 1 << 40),
        (".5KiB", 512),
    ],
)
def test_memory_budget_is_parsed_to_bytes(given, expected):
    options = Options(memory_budget=given)
    assert options.memory_budget == expected
    assert options.budget_bytes == expected
    assert parse_bytes(given) == expected


@pytest.mark.parametrize(
    "given",
    [0, -1, True, False, float("nan"), 1e9, "nan", "inf", "-5MiB", "", "MiB", "5 parsecs", "0",
     "0.2B", [1], "1e400", "1,5GiB"],
)  # fmt: skip
def test_memory_budget_refuses(given):
    with pytest.raises(OptionError, match=r"memory_budget=.*512MiB"):
        Options(memory_budget=given)


@pytest.mark.parametrize("name", ["chunk_size", "min_outputs"])
@pytest.mark.parametrize("given", [0, -3, 1.5, True, "64", float("nan")])
def test_counts_refuse(name, given):
    with pytest.raises(OptionError, match=rf"{name}=.*at least 1"):
        Options(**{name: given})


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_compute_dtype_is_a_dtype_or_its_name(given):
    assert Options(compute_dtype=given).compute_dtype is torch.bfloat16
    assert Options(compute_dtype=given).compute is torch.bfloat16


@pytest.mark.parametrize("given", ["float7", torch.int64, torch.float8_e5m2, 16, "nn", "int8"])
def test_compute_dtype_refuses(given):
    with pytest.raises(OptionError, match=r"compute_dtype=.*bfloat16"):
        Options(compute_dtype=given)


def test_choices_name_the_nearest():
    with pytest.raises(OptionError, match=r"lower='inductr'.*Did you mean 'inductor'"):
        Options(lower="inductr")
    with pytest.raises(OptionError, match=r"loss_value='defered'.*Did you mean 'deferred'"):
        Options(loss_value="defered")
    with pytest.raises(OptionError, match="accepted"):
        Options(lower=["eager"])


def test_deferred_values():
    for value in ("auto", "exact", "deferred"):
        assert Options(loss_value=value).loss_value == value
    with pytest.raises(OptionError, match="'auto' or 'exact' or 'deferred'"):
        Options(loss_value="early")
    for value in (True, False, "auto"):
        assert Options(deferred_logits=value).deferred_logits == value
    with pytest.raises(OptionError, match="'auto', True or False"):
        Options(deferred_logits="yes")


@pytest.mark.parametrize(
    ("name", "given"),
    [("strict", 1), ("strict", "yes"), ("mode", 3), ("inductor", [1]), ("inductor", {1: 2})],
)
def test_other_fields_refuse(name, given):
    with pytest.raises(OptionError, match=f"{name}="):
        Options(**{name: given})


def test_from_mapping():
    options = Options(chunk_size=7)
    assert Options.from_mapping(options) is options
    assert Options.from_mapping(None) == Options()
    assert Options.from_mapping({"chunk_size": 7}) == options
    with pytest.raises(
        OptionError, match=r"'chunksize'; did you mean 'chunk_size'\? Accepted: min"
    ):
        Options.from_mapping({"chunksize": 7})
    with pytest.raises(OptionError, match="did you mean"):
        Options.from_mapping({3: 7})
    with pytest.raises(OptionError, match=r"a dict, elmo_compile\.Options or None"):
        Options.from_mapping([("chunk_size", 7)])


def test_inductor_is_kept_read_only():
    given = {"max_autotune": True}
    options = Options(inductor=given)
    given["max_autotune"] = False
    assert options.inductor == {"max_autotune": True}
    with pytest.raises(TypeError):
        options.inductor["max_autotune"] = False  # type: ignore[index]


def test_options_copy_pickle_and_hash():
    options = Options(memory_budget="1MiB", inductor={"a": 1}, compute_dtype="float32")
    for twin in (copy.deepcopy(options), pickle.loads(pickle.dumps(options))):
        assert twin == options
        assert hash(twin) == hash(options)


def test_cache_tag_tells_options_apart_and_nothing_else():
    assert Options(memory_budget="1KiB").cache_tag() == Options(memory_budget=1024).cache_tag()
    first, second = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert Options(inductor=first).cache_tag() == Options(inductor=second).cache_tag()
    variants = [
        Options(), Options(strict=True), Options(chunk_size=5), Options(min_outputs=5),
        Options(lower="eager"), Options(inductor={"a": 1}), Options(mode="default"),
        Options(memory_budget=5), Options(compute_dtype="float32"), Options(loss_value="deferred"),
        Options(deferred_logits=False),
    ]  # fmt: skip
    assert len({options.cache_tag() for options in variants}) == len(variants)
