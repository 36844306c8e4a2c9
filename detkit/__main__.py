"""`python -m detkit`: the command line."""

from detkit.cli import entry

if __name__ == "__main__":
    entry()
