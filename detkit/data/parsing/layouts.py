"""What a folder seems to hold where it is not what the config's format needs."""

from pathlib import Path

_MARKS = {"coco": ("annotations/*.json",), "voc": ("Annotations", "JPEGImages"), "yolo": ("*.yaml", "*/labels")}
"""Names of formats, and what lies in a folder of each."""


def other_layout(root: str, asked: str) -> str:
    """A sentence, with a blank before it, that names the format that a folder looks like.

    Args:
        root: the folder that lacks what it should hold.
        asked: the format that the config names.

    Returns:
        An empty text where it looks like no other format.
    """
    folder = Path(root).expanduser()
    for name, marks in _MARKS.items():
        if name != asked and all(next(folder.glob(mark), None) for mark in marks):
            return f" It looks like data of the format {name}: --data '{{name: {name}, root: \"{root}\"}}'."
    return ""
