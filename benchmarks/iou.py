"""detkit bench iou, from a checkout: python benchmarks/iou.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["bench", "iou", *sys.argv[1:]]))
