"""detkit bench scaling, from a checkout: python benchmarks/scaling.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["bench", "scaling", *sys.argv[1:]]))
