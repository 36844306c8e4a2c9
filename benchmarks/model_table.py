"""detkit bench model_table, from a checkout: python benchmarks/model_table.py ..."""

import sys

from detkit.cli import main

sys.exit(main(["bench", "model_table", *sys.argv[1:]]))
