"""detkit eval, from a checkout: python tools/eval.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["eval", *sys.argv[1:]]))
