"""detkit bench train_step, from a checkout: python benchmarks/train_step.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["bench", "train_step", *sys.argv[1:]]))
