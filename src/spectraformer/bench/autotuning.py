# mypy: disable-error-code="import-untyped,import-not-found"
"""Triton's autotuner compiles one configuration after the other; here all that it searches is compiled at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def compiled_at_once() -> Iterator[None]:
    """Kernels that are autotuned inside the block have all configurations compiled first, by threads.

    What is searched, how it is timed and what is chosen stay the same.
    """
    from triton import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def run_compiled(self: Any, *arguments: Any, **options: Any) -> Any:
        asked = {name: option for name, option in options.items() if name != "warmup"}
        with ThreadPoolExecutor() as threads, AsyncCompileMode(threads, ignore_errors=True):
            self.warmup(*arguments, **asked)
        return run(self, *arguments, **options)

    Autotuner.run = run_compiled
    try:
        yield
    finally:
        Autotuner.run = run
