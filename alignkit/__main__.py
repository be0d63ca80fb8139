"""`python -m alignkit`, the form that `accelerate launch -m alignkit` needs; nothing else."""

import sys

from alignkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
