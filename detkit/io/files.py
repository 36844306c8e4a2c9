"""Reading and writing files: the only module that parses JSON and YAML, and the only one that writes.

Readers report a damaged or malicious file by an error that names it. Writers replace a file atomically. New formats
get both by using these functions.
"""

import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

from detkit.errors import DataError, DetkitError, WriteError, printable

YAML_LENGTH = 10_000_000
"""Maximum characters of a YAML file: PyYAML takes about a second per megabyte."""
EXPANDED_LENGTH = 20_000_000
"""Maximum characters of a YAML file with aliases expanded: nine lines of aliases can expand to a billion."""
FLOW_DEPTH = 100
"""Maximum depth of nested brackets in a YAML file."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
LONGEST_NAME = 200
"""Maximum bytes of a name returned by `safe_name`; file systems allow 255, which leaves room for a suffix."""
REMEDIES = {
    errno.ENOSPC: "Free some space on that disk, or write elsewhere.",
    errno.EDQUOT: "Free some space of your quota, or write elsewhere.",
    errno.EACCES: "Change its permissions, or write elsewhere.",
    errno.EPERM: "Change its permissions, or write elsewhere.",
    errno.EROFS: "Write to another disk.",
    errno.ENOENT: "Its folder does not exist or was removed.",
    errno.ENAMETOOLONG: "Give a shorter name.",
}


def read_text(path: str | Path, kind: str, error: type[DetkitError] = DataError) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Args:
        path: the file.
        kind: description of the file, for messages: "config", "annotation file".
        error: the class of the error raised.

    Raises:
        DetkitError: of the class `error`, if the file is missing, unreadable, not a file or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(
            f"The {kind} '{path}' is not UTF-8 text (byte {reason.start} is 0x{reason.object[reason.start]:02x}). Save "
            f"it as UTF-8."
        ) from None
    except OSError as reason:
        raise error(f"The {kind} '{path}' cannot be read: {reason.strerror}. Check the path.") from None
    except ValueError as reason:  # a path with NUL
        raise error(f"The {kind} {str(path)!r} cannot be read: {reason}. Check the path.") from None


def read_json(path: str | Path, kind: str, error: type[DetkitError] = DataError, allow_nan: bool = False) -> Any:
    """Read a JSON file; arguments and errors as for `read_text` and `parse_json`."""
    return parse_json(read_text(path, kind, error), f"{kind} '{path}'", error, allow_nan)


def parse_json(text: str, where: str, error: type[DetkitError] = DataError, allow_nan: bool = False) -> Any:
    """Parse JSON text.

    Lone surrogates are rejected. A number such as 1e999 is read as infinity: callers check the numbers that they use.

    Args:
        text: the JSON text.
        where: the file or the part of it, for messages: "annotation file 'x.json'".
        error: the class of the error raised.
        allow_nan: accept NaN and Infinity, which are not valid JSON, for callers that report the entry with such a
            number themselves.

    Raises:
        DetkitError: of the class `error`, if the text is not valid JSON or is nested too deeply.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number in JSON")

    try:
        content = json.loads(text, parse_constant=None if allow_nan else refuse)
        if ESCAPED_SURROGATE.search(text) is not None:
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except RecursionError:
        raise error(f"The {where} is nested too deeply to be read. Generate it again.") from None
    except UnicodeEncodeError:
        raise error(f"The {where} contains text with half of a surrogate pair, which is not valid. Fix it.") from None
    except ValueError as reason:
        raise error(f"The {where} is not valid JSON: {_one_line(reason)}. Fix it or generate it again.") from None


def read_yaml(path: str | Path, kind: str, error: type[DetkitError] = DataError, as_text: bool = False) -> Any:
    """Read a YAML file; arguments and errors as for `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, kind, error), f"{kind} '{path}'", error, as_text)


def parse_yaml(text: str, where: str, error: type[DetkitError] = DataError, as_text: bool = False) -> Any:
    """Parse YAML text to dicts, lists, text, numbers, true, false and null, never to Python objects.

    Duplicate keys are an error, 1e-3 is a number, and a date is text.

    Args:
        text: the YAML text.
        where: the file or the part of it, for messages: "config 'x.yaml'".
        error: the class of the error raised.
        as_text: return every scalar as its source text, so that the class names `yes`, `1` and `null` are kept. An
            empty scalar becomes "".

    Raises:
        DetkitError: of the class `error`, if the text is not valid YAML, is longer than YAML_LENGTH, is nested too
            deeply (FLOW_DEPTH), or is longer than EXPANDED_LENGTH with its aliases expanded.
    """
    if len(text) > YAML_LENGTH:
        raise error(f"The {where} has {len(text):,} characters, but YAML is read up to {YAML_LENGTH:,}.")
    loader = None
    try:
        loader = (_TextLoader if as_text else _Loader)(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node)
    except RecursionError:
        raise error(f"The {where} is nested too deeply to be read. Generate it again.") from None
    # PyYAML's constructors raise any of these for scalars such as 0b, 12:a or !!int "".
    except (yaml.YAMLError, ValueError, TypeError, IndexError, KeyError, AttributeError) as reason:
        raise error(f"The {where} is not valid YAML: {printable(_one_line(reason))}. Fix it.") from None
    finally:
        if loader is not None:
            loader.dispose()


@contextmanager
def replacing(path: str | Path, mode: str = "wb", durable: bool = True, **options: Any) -> Iterator[IO[Any]]:
    """Open a file for writing that replaces `path` atomically when the block ends without an error.

    The content is written to a temporary file in the same folder, flushed to disk and renamed. Readers of `path` see
    the old content or the new, never a part, even after a power failure. A path that is not a regular file, such as
    /dev/stdout, is written to directly.

    Args:
        path: the file to write; its folder must exist.
        mode: "wb", or "w" for UTF-8 text.
        durable: wait for the disk (fsync). False for numerous results that can be computed again.
        options: further arguments of `open`, such as newline.

    Raises:
        WriteError: the file cannot be written; an existing file is unchanged.
    """
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            with target.open(mode, **options) as file:
                yield file
            return
        temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            with temporary.open(mode, **options) as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if durable:
            _sync_folder(target.parent)
    except OSError as reason:
        raise write_error(path, reason) from reason
    except UnicodeEncodeError as reason:
        raise WriteError(f"{_named(path)} cannot be written: {reason.reason}. Fix that name or text.") from None
    except ValueError as reason:
        if "\0" not in str(path):
            raise
        raise WriteError(f"{_named(path)} cannot be written: {reason}. Give another name.") from None


def write_bytes(path: str | Path, content: bytes, durable: bool = True) -> None:
    """Write a file atomically, see `replacing`; its folder is created if needed.

    Raises:
        WriteError: the file cannot be written.
    """
    make_folder(Path(path).parent)
    with replacing(path, durable=durable) as file:
        file.write(content)


def write_text(path: str | Path, content: str, durable: bool = True) -> None:
    """Write UTF-8 text; see `write_bytes`."""
    try:
        encoded = content.encode()
    except UnicodeEncodeError as reason:
        raise WriteError(f"{_named(path)} cannot be written as UTF-8: {reason.reason}. Fix that text.") from None
    write_bytes(path, encoded, durable)


def write_json(path: str | Path, content: Any, durable: bool = True) -> None:
    """Write JSON; see `write_bytes`. NaN and infinity, which are not valid JSON, raise ValueError."""
    write_text(path, json.dumps(content, allow_nan=False), durable)


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents if needed.

    Raises:
        WriteError: the folder cannot be created.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as reason:
        raise write_error(path, reason) from reason
    return Path(path)


def claim_folder(path: str | Path) -> Path:
    """Create a new folder `path`, or `path` followed by the first free number: run, run2, run3 ...

    Processes that claim the same folder at the same time get different ones.

    Raises:
        WriteError: no folder can be created there.
    """
    path = Path(path)
    make_folder(path.parent)
    number = 1
    while True:
        folder = path if number == 1 else path.with_name(f"{path.name}{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
        except (OSError, ValueError) as reason:
            raise write_error(folder, reason) from reason


def safe_name(text: str) -> str:
    """Encode any text, such as a class name, as the name of a file or folder.

    Letters, digits, spaces and harmless punctuation are kept; everything else, and a dot or space at either end,
    becomes %XX as in a URL. Names of up to LONGEST_NAME bytes are unique, and none refers to another folder. A longer
    name is truncated and ends in a part of the text's SHA-256.
    """
    last = len(text) - 1
    name = "".join(
        letter
        if letter.isalnum() or letter in "-_+()[],=&@'!" or (letter in " ." and 0 < index < last)
        else "".join(f"%{byte:02X}" for byte in letter.encode(errors="surrogatepass"))
        for index, letter in enumerate(text)
    )
    encoded = name.encode()
    if len(encoded) > LONGEST_NAME:
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
        name = f"{encoded[: LONGEST_NAME - 17].decode(errors='ignore')}-{digest}"
    return name


def write_error(path: str | Path, reason: OSError | ValueError) -> WriteError:
    """Create the error that says why `path` cannot be written, and the remedy."""
    code = getattr(reason, "errno", None) or 0
    text = getattr(reason, "strerror", None) or str(reason)
    remedy = REMEDIES.get(code, "Check the path, the free space and the permissions.")
    return WriteError(f"{_named(path)} cannot be written: {text}. {remedy}")


class _Loader(yaml.SafeLoader):
    """A loader of plain values only, which rejects duplicate keys; PyYAML silently keeps the last one."""

    def fetch_flow_collection_start(self, *arguments: Any) -> None:
        # PyYAML's time per bracket grows with the number of open ones: thousands would take seconds.
        if self.flow_level >= FLOW_DEPTH:
            raise RecursionError
        super().fetch_flow_collection_start(*arguments)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                problem = f"the key '{key_node.value}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _as_written(loader: _Loader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


# PyYAML reads 1e-3 as text, because YAML 1.1 requires 1.0e-3; users mean the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _as_written)


class _TextLoader(_Loader):
    """A loader that returns every scalar as its source text."""


for _kind in ("bool", "int", "float", "null", "timestamp"):
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _as_written)


def _check_nodes(root: yaml.Node) -> None:
    """Check that a document does not contain itself, is not too long with its aliases expanded, and is valid text.

    Raises:
        yaml.YAMLError: it fails one of these checks.
    """
    lengths: dict[int, int] = {}
    open_nodes: set[int] = set()

    def length(node: yaml.Node) -> int:
        key = id(node)
        if key in open_nodes:
            raise yaml.YAMLError("an alias refers to a value that contains the alias itself")
        if key not in lengths:
            open_nodes.add(key)
            if isinstance(node, yaml.MappingNode):
                total = sum(length(name) + length(value) for name, value in node.value)
            elif isinstance(node, yaml.SequenceNode):
                total = sum(length(item) for item in node.value)
            else:
                total = len(node.value)
                if LONE_SURROGATE.search(node.value) is not None:
                    raise yaml.YAMLError("it contains text with half of a surrogate pair")
            open_nodes.discard(key)
            lengths[key] = total + 1
        return lengths[key]

    if length(root) > EXPANDED_LENGTH:
        raise yaml.YAMLError(f"it has more than {EXPANDED_LENGTH:,} characters once its aliases are expanded")


def _sync_folder(folder: Path) -> None:
    """Flush a rename in a folder to disk, if the file system supports it (network file systems and Windows may not)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _one_line(reason: Exception) -> str:
    return " ".join(str(reason).split())


def _named(path: str | Path) -> str:
    return f"'{printable(str(path))}'"
