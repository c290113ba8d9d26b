"""Settings for all tests."""

import os

# Before torch is imported, and inherited by the processes that tests start: several processes with several threads each
# on few cores run many times slower.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import torch  # noqa: E402

torch.set_num_threads(1)
