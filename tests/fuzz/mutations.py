"""Damaged and hostile variants of a valid file: bytes, tokens of text, and nodes of JSON."""

import copy
import json
import random
import re
from typing import Any

TOKENS = (
    *("", "0", "-1", "1", "3.7", "nan", "inf", "-inf", "1e400", "-1e-400", "0x10", "1_000", "٣", "1e9", "99999999999"),
    *(
        "9" * 400,
        "9" * 5000,
        "true",
        "null",
        "~",
        "yes",
        "[",
        "]",
        "{",
        "}",
        "<",
        ">",
        "&a",
        "*a",
        "<<",
        "'",
        '"',
        "\\",
    ),
    *("%s", "{}", "..", "../../../etc/passwd", "/", "/dev/zero", "\0", "\x1b[31m", "\ud83d", "é", "x" * 300, "!!int x"),
    *("!!python/object/apply:os.system [id]", "class_path", "&lol;", "- ", ": ", "#", "\n", "\r\n", "\t", "\ufeff"),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        10**400,
        0.5,
        -0.0,
        1e308,
        1e-308,
        "",
        "0",
        "nan",
        "x" * 300,
        "\0",
        "..",
    ),
    *("\x1b[31m", [], {}, [[]], [0], [None], ["a", 1], {"name": "ssd"}, {"class_path": "os.system"}, [[[[[[1]]]]]]),
    *([1e308] * 4, [-1, -1, 0, 0], {"counts": [1], "size": [1, 1]}, {"counts": "0", "size": [10**6, 10**6]}),
)
BYTES = (b"\x00", b"\xff", b"\x80", b"\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\x00" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff")
LONGEST = 200_000
"""Bytes of an input: a line repeated twice would else make one of a hundred megabytes."""
NUMBER_OR_WORD = re.compile(r"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?|[^\W\d]\w*|\S")


def mutate(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to three mutations of `content`, of a kind that suits it; `others` are files to take pieces from."""
    kinds = [_bytes, _bytes, _tokens, _tokens] if _is_text(content) else [_bytes]
    if content[:1] in (b"{", b"["):
        kinds += [_json] * 4
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = rng.choice(kinds)(content, others, rng)[:LONGEST]
    return content


def _is_text(content: bytes) -> bool:
    return b"\0" not in content[:1000] and content[:500].isascii()


def _bytes(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    size = len(content)
    start = rng.randrange(size + 1)
    end = min(size, start + rng.choice((1, 2, 4, 16, 100, size)))
    kind = rng.randrange(7)
    if kind == 0 and size:  # flip a bit
        place = rng.randrange(size)
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if kind == 1:
        return content[:start]
    if kind == 2:
        return content[:start] + content[end:]
    if kind == 3:
        return content[:end] + content[start:]
    if kind == 4:
        other = rng.choice(others)
        cut = rng.randrange(len(other) + 1)
        return content[:start] + other[cut : cut + rng.choice((4, 64, 1000))] + content[end:]
    if kind == 5:
        return content[:start] + rng.choice(BYTES) + content[start:]
    replacement = rng.choice(BYTES)
    return content[:start] + replacement + content[start + len(replacement) :]


def _tokens(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    text = content.decode("utf-8", errors="replace")
    kind = rng.randrange(5)
    lines = text.splitlines(keepends=True)
    if kind == 0 and lines:  # a line again, or without it
        index = rng.randrange(len(lines))
        lines[index : index + 1] = [lines[index]] * min(rng.choice((0, 2, 2, 1000)), 2 + LONGEST // len(lines[index]))
        return "".join(lines).encode(errors="replace")
    found = list(NUMBER_OR_WORD.finditer(text))
    if not found:
        return rng.choice(TOKENS).encode(errors="replace")
    match = rng.choice(found)
    other = rng.choice(found)[0] if kind == 1 else rng.choice(TOKENS)
    if kind == 2:  # nested
        other = "[" * 2000 if rng.random() < 0.1 else f"[{match[0]}]"
    return (text[: match.start()] + other + text[match.end() :]).encode("utf-8", errors="surrogatepass")


def _json(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    try:
        root = json.loads(content)
    except (ValueError, RecursionError):
        return _tokens(content, others, rng)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(root)
    if not places:
        return json.dumps(rng.choice(VALUES)).encode()
    node, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1:
        other, place = rng.choice(places)
        node[key] = copy.deepcopy(other[place])
    elif kind == 2 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    elif kind == 2 and isinstance(node, dict):
        node[rng.choice(("", "name", "class_path", "id", "x" * 100))] = node.pop(key)
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(root).encode()
