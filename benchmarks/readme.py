"""Puts the results of benchmarks/results into the tables of the README: python benchmarks/readme.py"""

from pathlib import Path

from detkit.bench.readme import rewrite

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    changed = rewrite(ROOT / "README.md", ROOT / "benchmarks" / "results")
    print(f"README.md: {'its tables are new' if changed else 'nothing changed'}")
