"""Entry point of `python -m detkit`."""

from detkit.cli import entry

if __name__ == "__main__":
    entry()
