"""Parser of Pascal VOC's XML files, with limits against damaged or malicious files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from detkit.data.dataset import number, rotation_of
from detkit.errors import printable

LONGEST = 16 * 2**20
"""Maximum bytes of a file: an image with 10,000 objects takes 4 million."""
DEEPEST = 64
"""Maximum nesting of elements; VOC has five levels."""
_DIFFICULT = {"1": True, "true": True, "0": False, "false": False, "": False, "unspecified": False}


class XmlError(ValueError):
    """The reason why a file cannot be used, and its line."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True)
class VocObject:
    """One <object>; `fault` is the reason why it cannot be used. The box is as in the file, `rotation` in degrees."""

    line: int
    name: str
    box: tuple[float, ...] = ()
    difficult: bool = False
    rotation: float = 0.0
    fault: str = ""


@dataclass(frozen=True)
class Document:
    """The content of one XML file.

    Args:
        path: the file.
        size: (height, width), None if missing.
        size_fault: the text of an invalid size, otherwise empty.
        filename: the file name of the image, "" if missing.
        objects: the objects in the order of the file.
    """

    path: Path
    size: tuple[int, int] | None
    size_fault: str
    filename: str
    objects: list[VocObject]


def read_document(path: Path) -> Document:
    """Read one XML file.

    Raises:
        FileNotFoundError: it does not exist.
        XmlError: it cannot be read, is not well-formed, or is not an <annotation>.
    """
    root = _parse(path)
    try:
        size, size_fault = _size(root)
        filename = root.text_of("filename")
    except ValueError as error:
        raise XmlError(str(error), root.line) from None
    objects = []
    for child in root.children:
        if child.tag == "object":
            objects.append(_read_object(child))
        elif child.holds("bndbox"):
            fault = f"<{child.tag}> holds a <bndbox>, but boxes are only read directly in an <object>"
            objects.append(VocObject(child.line, "", fault=fault))
    return Document(path, size, size_fault, filename, objects)


@dataclass(slots=True)
class _Element:
    tag: str
    line: int
    parts: list[str] = field(default_factory=list)
    children: list[_Element] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts).strip()

    def child(self, tag: str) -> _Element | None:
        """The child of this name.

        Raises:
            ValueError: there are several.
        """
        found = [child for child in self.children if child.tag == tag]
        if len(found) > 1:
            raise ValueError(f"<{self.tag}> has {len(found)} <{tag}>, but one is expected")
        return found[0] if found else None

    def required(self, tag: str) -> _Element:
        """The child of this name.

        Raises:
            ValueError: there is none, or several.
        """
        child = self.child(tag)
        if child is None:
            # Such as a <robndbox>, or coordinates as one text.
            instead = next((f"<{child.tag}>" for child in self.children if tag in child.tag), None)
            instead = instead or (f"the text {self.text[:60]!r}" if self.text else None)
            raise ValueError(f"<{self.tag}> has no <{tag}>{f', but {instead}' if instead else ''}")
        return child

    def text_of(self, tag: str) -> str:
        """The text of a child, "" where there is none."""
        child = self.child(tag)
        return "" if child is None else child.text

    def holds(self, tag: str) -> bool:
        return any(child.tag == tag or child.holds(tag) for child in self.children)


def _size(root: _Element) -> tuple[tuple[int, int] | None, str]:
    """Return (height, width) and its invalid text. Some tools leave the size empty or 0, which means unknown."""
    size = root.child("size")
    if size is None:
        return None, ""
    texts = [size.text_of("height"), size.text_of("width")]
    try:
        sides = [number(text or 0) for text in texts]
        if not all(side >= 0 and side == math.floor(side) for side in sides):
            raise ValueError
    except (ValueError, OverflowError):
        return None, " and ".join(texts)
    return (int(sides[0]), int(sides[1])) if all(sides) else None, ""


def _read_object(element: _Element) -> VocObject:
    name = ""
    try:
        text = element.required("name").text
        if not text or "\n" in text or text != printable(text):
            raise ValueError(f"<name> must be one line of printable text, but is {text[:60]!r}")
        name = text
        bounds = element.required("bndbox")
        box = tuple(number(bounds.required(tag).text) for tag in ("xmin", "ymin", "xmax", "ymax"))
        difficult = element.text_of("difficult")
        if difficult.lower() not in _DIFFICULT:
            raise ValueError(f"<difficult> must be 0 or 1, but is {difficult[:60]!r}")
        return VocObject(element.line, name, box, _DIFFICULT[difficult.lower()], _rotation(element))
    except ValueError as error:
        return VocObject(element.line, name, fault=str(error))


def _rotation(element: _Element) -> float:
    """Return the rotation of an object in degrees: an attribute in CVAT's files, an element in others."""
    attributes = element.child("attributes")
    found = [element.text_of("rotation")] + [
        attribute.text_of("value")
        for attribute in (attributes.children if attributes is not None else ())
        if attribute.text_of("name") == "rotation"
    ]
    given = [text for text in found if text]
    if len(given) > 1:
        raise ValueError(f"<object> has {len(given)} rotations, but one is expected")
    return rotation_of(given[0]) if given else 0.0


def _parse(path: Path) -> _Element:
    """Parse an XML file to its root; unlike in the standard library's trees, elements have their line numbers."""
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError for a name with NUL
        raise XmlError(f"the file cannot be read ({getattr(error, 'strerror', None) or error})", 1) from None
    if len(content) > LONGEST:
        raise XmlError(f"the file has more than {LONGEST:,} bytes, too many for the annotation of an image", 1)
    top = _Element("", 0)
    open_elements = [top]
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(tag: str, _: dict[str, str]) -> None:
        if len(open_elements) > DEEPEST:
            raise ValueError(f"elements are nested more than {DEEPEST} deep")
        element = _Element(tag, parser.CurrentLineNumber)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def end(_: str) -> None:
        open_elements.pop()

    def characters(text: str) -> None:
        open_elements[-1].parts.append(text)

    def refuse(name: str, *_: object) -> None:
        raise ValueError(f"it has the entity '{name}', but only XML's five predefined entities are supported")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, characters
    parser.EntityDeclHandler, parser.SkippedEntityHandler = refuse, refuse
    try:
        parser.Parse(content, True)
    # All except the first are caused by an encoding that expat does not support.
    except (expat.ExpatError, LookupError, ValueError, TypeError) as error:
        unknown_encoding = isinstance(error, LookupError) or "encoding" in str(error)
        hint = (
            "; save it as UTF-8, and declare that in its first line"
            if unknown_encoding or not _is_utf8(content)
            else ""
        )
        line = getattr(error, "lineno", None) or parser.CurrentLineNumber
        raise XmlError(f"the XML cannot be parsed ({error}){hint}", line) from None
    root = top.children[0]
    if root.tag.lower() != "annotation":
        raise XmlError(f"its root is <{root.tag}>, but a VOC file has the root <annotation>", root.line)
    return root


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
