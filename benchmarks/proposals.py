"""detkit bench proposals, from a checkout: python benchmarks/proposals.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["bench", "proposals", *sys.argv[1:]]))
