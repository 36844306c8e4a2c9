"""Recognition of the format of a data folder, for errors about a wrong format."""

from pathlib import Path

_MARKS = {"coco": ("annotations/*.json",), "voc": ("Annotations", "JPEGImages"), "yolo": ("*.yaml", "*/labels")}
"""Formats, and patterns of their typical content."""


def other_layout(root: str, asked: str) -> str:
    """Suggest the format that a folder looks like.

    Args:
        root: the folder without the expected content.
        asked: the format in the config.

    Returns:
        A sentence with a leading space; empty if it does not look like another format.
    """
    folder = Path(root).expanduser()
    for name, marks in _MARKS.items():
        if name != asked and all(next(folder.glob(mark), None) for mark in marks):
            return f" It looks like data of the format {name}: --data '{{name: {name}, root: \"{root}\"}}'."
    return ""
