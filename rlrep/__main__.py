"""The command line, as `python -m rlrep` and `torchrun -m rlrep` start it."""

import sys

from rlrep.cli import main

if __name__ == "__main__":
    sys.exit(main())
