"""detkit train, from a checkout: python tools/train.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
