"""detkit bench learning, from a checkout: python benchmarks/learning.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["bench", "learning", *sys.argv[1:]]))
