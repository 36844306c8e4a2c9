"""detkit infer, from a checkout: python tools/infer.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["infer", *sys.argv[1:]]))
