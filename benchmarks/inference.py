"""detkit bench inference, from a checkout: python benchmarks/inference.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["bench", "inference", *sys.argv[1:]]))
