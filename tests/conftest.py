"""Settings for all tests."""

import os
import signal

# In the background of a shell Ctrl-C is ignored, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported, and inherited by the processes that tests start: several processes with several threads each
# on few cores run many times slower.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import torch  # noqa: E402

torch.set_num_threads(1)
