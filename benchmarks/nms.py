"""detkit bench nms, from a checkout: python benchmarks/nms.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["bench", "nms", *sys.argv[1:]]))
