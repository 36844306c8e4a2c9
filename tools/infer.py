"""detkit infer, from a checkout: python tools/infer.py ..."""

import sys

from detkit.cli import entry

entry(["infer", *sys.argv[1:]])
