"""`assert_rewritten`: a user's own unit test that a model's head is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elmo_compile.config import Options
from elmo_compile.explain import explain
from elmo_compile.report.records import Report


def assert_rewritten(
    fn: Callable[..., Any],
    *args: Any,
    loss: str,
    count: int = 1,
    fused_update: bool | None = None,
    options: Options | dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Assert that `torch.compile(fn, backend="elmo")` rewrites the heads you expect.

    Args:
        fn: a model or function; it is explained, not run (see `elmo_compile.explain`).
        *args: its arguments.
        loss: the loss's name in `torch.nn.functional`.
        count: how many heads with this loss are expected.
        fused_update: if given, whether each of their updates must be fused.
        options: as for the backend, e.g. `{"min_outputs": 100}` for a small test model.
        **kwargs: further keyword arguments of `fn`.

    Returns:
        The report.

    Raises:
        AssertionError: with the whole report, if it differs.
    """
    report = explain(fn, *args, options=options, **kwargs)
    found = [match for match in report.matches if match.loss == loss]
    if len(found) != count:
        raise AssertionError(
            f"expected {count} rewritten head(s) with {loss}, found {len(found)}:\n{report}"
        )
    if fused_update is not None:
        wrong = [match for match in found if match.fused_update != fused_update]
        if wrong:
            raise AssertionError(
                f"expected fused_update={fused_update} for {loss}, "
                f"found {not fused_update}:\n{report}"
            )
    return report
