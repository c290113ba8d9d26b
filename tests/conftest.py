"""Settings for all tests."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

# In the background of a shell Ctrl-C is ignored, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported, and inherited by the processes that tests start: several processes with several threads each
# on few cores run many times slower.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


LONG = ("test_readme", "test_recipe", "test_finetune", "test_cli", "test_pretrain")
"""Files that take minutes: begun first, or one worker would be left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files; within each, tests stay as they are."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `finetune` and `map_missing` do their jobs in this process, which is quicker."""

    def here(
        function: Any, jobs: list[Any], *args: Any, receive: Any = lambda job, message: None, **options: Any
    ) -> Iterator[tuple[Any, Any]]:
        for job in jobs:
            yield job, function(job, lambda message, job=job: receive(job, message))

    for module in ("finetune", "fanout"):
        monkeypatch.setattr(sys.modules[f"rlrep.{module}"], "map_jobs", here)
