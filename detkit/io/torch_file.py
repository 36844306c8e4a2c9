"""Safe reader of torch.save files, which executes nothing: the only module that opens a pickle.

torch.load, even with `weights_only`, calls functions and classes named in the file with arguments from the file. Here
the pickle is parsed by the standard library's pickletools, which executes nothing, and only dicts, lists, tuples, text,
bytes, numbers and plain tensors are built from it. Everything else (a pickled model, a NumPy scalar, a Namespace of
options) becomes a `Foreign`, which stores only the name. Memory and time are bounded by the size of the file.
"""

import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from detkit.errors import CheckpointError, printable

OPERATIONS = 1_000_000
"""Maximum number of opcodes of a pickle, plus one per 100 bytes of the file; a tensor takes about 75."""
CALL_COST = 20
"""Opcodes that a call counts for: a tensor object takes about a kilobyte, regardless of its size."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
STORAGES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
    "Untyped": torch.uint8,
}
LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
EMPTY: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": lambda: Foreign("set")},
}
PLAIN_KEYS = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, eq=False)
class Foreign:
    """Placeholder for a class, a function or an object in a file, of which only the name is kept."""

    name: str


class DamagedError(ValueError):
    """A damaged file; the message gives the reason without the file's name."""


@dataclass(frozen=True, eq=False)
class _Storage:
    """(N,) uint8 bytes of numbers of `dtype`."""

    content: Tensor
    dtype: torch.dtype


def read_torch(path: str | Path, kind: str = "file of weights") -> Any:
    """Read a file of torch.save: dicts, lists, tuples, text, bytes, numbers, None and tensors on the CPU.

    Objects of any other class become `Foreign`.

    Args:
        path: the file.
        kind: description of the file, for messages.

    Raises:
        CheckpointError: torch.save did not write it, it is damaged, or it cannot be read; the message names it.
    """
    where = f"The {kind} '{printable(str(path))}'"
    try:
        with Path(path).open("rb") as file:
            return _read_zip(file) if file.read(4) == b"PK\x03\x04" else _read_legacy(file)
    except DamagedError as error:
        raise CheckpointError(f"{where} cannot be read: {error}.") from None
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}. Check the path.") from None
    # zipfile, pickletools and torch raise dozens of exception classes on damaged content; the remedy is the same.
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{where} is damaged or truncated ({reason}). Get a complete copy of it.") from None


def one_line(error: Exception) -> str:
    """Format the message of another library's exception as one printable line of limited length."""
    return printable(" ".join(str(error)[:300].split()))


class _Storages:
    """Creates the storages that a pickle refers to; their total size may not exceed that of the file."""

    def __init__(self, file_size: int, fill: Callable[[str, Tensor], None]) -> None:
        self.file_size = self.left = file_size
        self.fill = fill
        self.known: dict[str, tuple[Tensor, int]] = {}

    def get(self, reference: Any) -> _Storage | Foreign:
        """Get the storage of a persistent id.

        Args:
            reference: ("storage", type, key, device, count), before PyTorch 0.4 with the view (key, first, count).
        """
        word, kind, key, _, count, *view = reference
        if word != "storage" or not isinstance(kind, Foreign) or not isinstance(key, str) or not _is_count(count):
            raise DamagedError("it refers to something that is not a storage of tensors")
        dtype = STORAGES.get(kind.name.rpartition(".")[2].removesuffix("Storage"))
        if dtype is None:
            return Foreign(kind.name)
        if key not in self.known:
            size = count * dtype.itemsize
            self.left -= size
            if self.left < 0:
                raise DamagedError("its tensors claim more bytes than the file has. It is damaged or truncated")
            self.known[key] = torch.empty(size, dtype=torch.uint8), dtype.itemsize
            self.fill(key, self.known[key][0])
        content, _ = self.known[key]
        if view and view[0] is not None:
            _, first, length = view[0]
            if not _is_count(first) or not _is_count(length) or (first + length) * dtype.itemsize > len(content):
                raise DamagedError("a view lies outside its storage")
            content = content[first * dtype.itemsize : (first + length) * dtype.itemsize]
        return _Storage(content, dtype)


def _read_zip(file: IO[bytes]) -> Any:
    """Read the format of PyTorch 1.6 and later: a zip archive with the pickle and a file for each storage."""
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
            raise DamagedError(
                "it is a TorchScript archive, which contains a program. Save only the tensors: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
            )
        if len(pickles) != 1:
            raise DamagedError(
                f"it is a zip archive of {printable(', '.join(names[:3]))[:200] or 'nothing'}, not a torch.save file"
            )
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(_stored(archive, f"{folder}byteorder", size)) != b"little":
            raise DamagedError("it was written on a big-endian machine. Save it again on a little-endian one")

        def fill(key: str, content: Tensor) -> None:
            part = _stored(archive, f"{folder}data/{key}", size)
            if part.file_size != len(content):
                raise DamagedError(
                    "a tensor does not have the number of bytes it claims. Get a complete copy of the file"
                )
            content.numpy().data[:] = archive.read(part)

        pickle = archive.open(_stored(archive, pickles[0], size))
        return _Unpickler(_Storages(size, fill)).run(pickle)


def _stored(archive: zipfile.ZipFile, name: str, most: int) -> zipfile.ZipInfo:
    """Get a file of an archive. torch.save does not compress, so a valid one is never larger than the archive."""
    part = archive.getinfo(name)
    if part.compress_type != zipfile.ZIP_STORED or part.file_size > most:
        raise DamagedError(
            f"its part '{printable(name)[:100]}' is compressed or larger than the file, which torch.save never "
            "writes. Load and save it again with torch"
        )
    return part


def _read_legacy(file: IO[bytes]) -> Any:
    """Read the format before PyTorch 1.6: four pickles, the keys of the storages, and their bytes in that order."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        storages = _Storages(len(data), lambda key, content: None)
        if _Unpickler(storages).run(data) != LEGACY_MAGIC or _Unpickler(storages).run(data) != LEGACY_PROTOCOL:
            raise DamagedError(
                "it is a pickle that was not written by torch.save, which detkit does not open. Save the tensors with "
                "torch.save(model.state_dict(), 'weights.pth')"
            )
        system = _Unpickler(storages).run(data)
        if not isinstance(system, dict) or not system.get("little_endian"):
            raise DamagedError("it was written on a big-endian machine. Save it again on a little-endian one")
        content = _Unpickler(storages).run(data)
        for key in _Unpickler(storages).run(data):
            target, item_size = storages.known.pop(key)
            (count,) = struct.unpack("<q", data.read(8))
            part = data.read(len(target))
            if count * item_size != len(target) or len(part) != len(target):
                raise DamagedError("it is truncated. Get a complete copy of the file")
            target.numpy().data[:] = part
        if storages.known:
            raise DamagedError("it lacks the bytes of some tensors. Get a whole copy of the file")
        return content


class _Unpickler:
    """Builds plain values from a pickle; see the module."""

    def __init__(self, storages: _Storages) -> None:
        self.storages = storages
        self.left = OPERATIONS + storages.file_size // 100
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: Any) -> Any:
        """Return the value of the next pickle in a stream, which is left at the pickle's end."""
        for opcode, argument, _ in pickletools.genops(stream):
            self._count(1)
            name = opcode.name
            if name in LITERALS:
                self.stack.append(argument)
            elif name in EMPTY:
                self.stack.append(EMPTY[name]())
            elif name == "STOP":
                return self.stack.pop()
            else:
                self._step(name, argument)
        raise DamagedError("its pickle has no end. It is truncated")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[argument])
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                items = self._since_mark()
                self.stack.append(tuple(items))
            case "LIST":
                items = self._since_mark()
                self.stack.append(items)
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._since_mark())
            case "DICT":
                items = self._since_mark()
                self.stack.append({})
                self._set_items(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._since_mark())
            case "FROZENSET":
                self._since_mark()
                self.stack.append(Foreign("frozenset"))
            case "GLOBAL":
                stack.append(Foreign(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if not isinstance(attribute, str) or not isinstance(module, str):
                    raise DamagedError("it contains a class name that is not text")
                stack.append(Foreign(f"{module}.{attribute}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "NEWOBJ_EX":
                _, _, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(self._call(function, None))
            case "OBJ":
                items = self._since_mark()
                self.stack.append(self._call(items[0], None))
            case "INST":
                self._since_mark()
                self.stack.append(Foreign(argument.replace(" ", ".")))
            case "BUILD":  # sets the state of an object, which is not built
                stack.pop()
            case "BINPERSID":
                stack.append(self.storages.get(stack.pop()))
            case _:
                raise DamagedError(f"its pickle has the opcode {name}, which torch.save does not write")

    def _count(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise DamagedError("its pickle has more opcodes than tensors need. Save only the model's state dict")

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                # Only plain keys: hashing nested tuples can take exponential time.
                target[key if type(key) in PLAIN_KEYS else Foreign("key")] = value

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Foreign):
            raise DamagedError("it calls something that is not a function")
        build = BUILDERS.get(function.name)
        if build is None or not isinstance(arguments, tuple):
            self._count(1)
            return Foreign(function.name)
        self._count(CALL_COST + sum(len(value) for value in arguments if isinstance(value, (list, tuple))))
        if build is _typed:
            return self._call(arguments[0], arguments[2])
        value = build(*arguments)
        if isinstance(value, Tensor) and value.numel() * value.element_size() > self.storages.file_size:
            raise DamagedError("a tensor claims more elements than the file has. It is damaged")
        return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor | Foreign:
    """Build a tensor as `torch._utils._rebuild_tensor` does, checking that it lies within its storage."""
    if not isinstance(storage, _Storage):
        return Foreign(f"a tensor of {storage.name}" if isinstance(storage, Foreign) else "a tensor without a storage")
    if len(rest) > 2 and rest[2]:
        return Foreign("a tensor with metadata")
    steps = (*size, *stride, offset)
    if len(size) != len(stride) or not all(map(_is_count, steps)):
        raise DamagedError("a tensor has a shape that is not valid. It is damaged")
    values = storage.content.view(storage.dtype)
    last = offset + sum((count - 1) * step for count, step in zip(size, stride))
    if math.prod(size) and last >= len(values):
        raise DamagedError("a tensor reaches beyond the end of its storage. It is damaged")
    return values.as_strided(size, stride, offset)


def _tensor_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, _: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    """Build a tensor of a dtype without its own storage class."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, Foreign) or dtype.name not in DTYPES:
        return Foreign("a tensor of an unknown type")
    return _tensor(_Storage(storage.content, DTYPES[dtype.name]), offset, size, stride, None, None, *rest)


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return {key: value for key, value in pairs if type(key) in PLAIN_KEYS}


def _first(value: Any, *_: Any) -> Any:
    return value


def _typed(function: Any, kind: Any, arguments: Any, state: Any) -> None:
    """Placeholder for `_rebuild_from_type_v2`, which calls another function of this table."""


BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _typed,
}


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
