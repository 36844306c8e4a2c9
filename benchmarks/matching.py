"""detkit bench matching, from a checkout: python benchmarks/matching.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["bench", "matching", *sys.argv[1:]]))
