"""Reads what torch.save wrote, without running anything: the only module that opens a pickle.

torch.load, with `weights_only` too, calls functions and classes that a file names, with arguments from the file. Here
the pickle is parsed by the standard library's pickletools, which executes nothing, and only dicts, lists, tuples, text,
bytes, numbers and plain tensors are built from it. Everything else (a pickled model, a number of NumPy, a Namespace of
options) becomes a `Foreign`, which is nothing but the name. Memory and time are bounded by the size of the file.
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
"""Steps that a pickle may have, and one more for each 100 bytes of the file; a tensor takes about 75."""
CALL_COST = 20
"""Steps that a call counts for: a tensor takes about a kilobyte, whatever its size."""
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
    """Stands for a class, a function or an object in a file, of which nothing was made but its name."""

    name: str


class DamagedError(ValueError):
    """The message says what is wrong with a file, without its name."""


@dataclass(frozen=True, eq=False)
class _Storage:
    """(N,) uint8 bytes of numbers of `dtype`."""

    content: Tensor
    dtype: torch.dtype


def read_torch(path: str | Path, kind: str = "file of weights") -> Any:
    """The content of a file of torch.save: dicts, lists, tuples, text, bytes, numbers, None and tensors on the CPU.

    Objects of any other class are `Foreign`.

    Args:
        path: the file.
        kind: what the file is, for messages.

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
    # Damaged content makes zipfile, pickletools and torch fail with dozens of classes; the remedy is the same for all.
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{where} is damaged or cut off ({reason}). Get a whole copy of it.") from None


def one_line(error: Exception) -> str:
    """The message of an exception of another library, safe to print and of a bearable length."""
    return printable(" ".join(str(error)[:300].split()))


class _Storages:
    """Makes the storages that a pickle refers to; all together they may not be larger than the file."""

    def __init__(self, file_size: int, fill: Callable[[str, Tensor], None]) -> None:
        self.file_size = self.left = file_size
        self.fill = fill
        self.known: dict[str, tuple[Tensor, int]] = {}

    def get(self, reference: Any) -> _Storage | Foreign:
        """The storage of ("storage", type, key, device, count), and before PyTorch 0.4 (key, first, count) of a part.

        Args:
            reference: what the pickle says.
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
                raise DamagedError("its tensors claim more bytes than the file has. It is damaged or cut off")
            self.known[key] = torch.empty(size, dtype=torch.uint8), dtype.itemsize
            self.fill(key, self.known[key][0])
        content, _ = self.known[key]
        if view and view[0] is not None:
            _, first, length = view[0]
            if not _is_count(first) or not _is_count(length) or (first + length) * dtype.itemsize > len(content):
                raise DamagedError("a part of a storage lies outside of it")
            content = content[first * dtype.itemsize : (first + length) * dtype.itemsize]
        return _Storage(content, dtype)


def _read_zip(file: IO[bytes]) -> Any:
    """Since PyTorch 1.6: an archive with the pickle and each storage as a part of its own."""
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
            raise DamagedError(
                "it is a TorchScript archive, a program with its tensors. Save the tensors alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
            )
        if len(pickles) != 1:
            raise DamagedError(
                f"it is a zip archive of {printable(', '.join(names[:3]))[:200] or 'nothing'}, not of torch.save"
            )
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(_stored(archive, f"{folder}byteorder", size)) != b"little":
            raise DamagedError("it was written on a machine with another order of bytes. Save it again on a usual one")

        def fill(key: str, content: Tensor) -> None:
            part = _stored(archive, f"{folder}data/{key}", size)
            if part.file_size != len(content):
                raise DamagedError("a tensor has another number of bytes than it claims. Get a whole copy of the file")
            content.numpy().data[:] = archive.read(part)

        pickle = archive.open(_stored(archive, pickles[0], size))
        return _Unpickler(_Storages(size, fill)).run(pickle)


def _stored(archive: zipfile.ZipFile, name: str, most: int) -> zipfile.ZipInfo:
    """A part of an archive; torch.save compresses none, so that none can become larger than the file."""
    part = archive.getinfo(name)
    if part.compress_type != zipfile.ZIP_STORED or part.file_size > most:
        raise DamagedError(
            f"its part '{printable(name)[:100]}' is compressed, or larger than the file. torch.save never writes that; "
            "load and save it again with torch"
        )
    return part


def _read_legacy(file: IO[bytes]) -> Any:
    """Before PyTorch 1.6: four pickles, the keys of the storages, then the bytes of these in that order."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        storages = _Storages(len(data), lambda key, content: None)
        if _Unpickler(storages).run(data) != LEGACY_MAGIC or _Unpickler(storages).run(data) != LEGACY_PROTOCOL:
            raise DamagedError(
                "it is a pickle that torch.save did not write, which detkit does not open. Save the tensors with "
                "torch.save(model.state_dict(), 'weights.pth')"
            )
        system = _Unpickler(storages).run(data)
        if not isinstance(system, dict) or not system.get("little_endian"):
            raise DamagedError("it was written on a machine with another order of bytes. Save it again on a usual one")
        content = _Unpickler(storages).run(data)
        for key in _Unpickler(storages).run(data):
            target, item_size = storages.known.pop(key)
            (count,) = struct.unpack("<q", data.read(8))
            part = data.read(len(target))
            if count * item_size != len(target) or len(part) != len(target):
                raise DamagedError("it is cut off. Get a whole copy of the file")
            target.numpy().data[:] = part
        if storages.known:
            raise DamagedError("it lacks the bytes of some tensors. Get a whole copy of the file")
        return content


class _Unpickler:
    """Builds plain values from a pickle."""

    def __init__(self, storages: _Storages) -> None:
        self.storages = storages
        self.left = OPERATIONS + storages.file_size // 100
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: Any) -> Any:
        """The value of the next pickle in a stream, which is left behind the pickle's end."""
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
        raise DamagedError("its pickle has no end. It is cut off")

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
                    raise DamagedError("it names a class by something that is not text")
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
            case "BUILD":  # the state of an object, none of which is made
                stack.pop()
            case "BINPERSID":
                stack.append(self.storages.get(stack.pop()))
            case _:
                raise DamagedError(f"its pickle has the step {name}, which torch.save does not write")

    def _count(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise DamagedError("its pickle has more steps than tensors need. Save the state dict of the model alone")

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
                # To hash nested tuples can take for ever.
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
    """A tensor as `torch._utils._rebuild_tensor` makes it, provided that it lies within its storage."""
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
    """As `_tensor`, for dtypes that have no storage class of their own."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, Foreign) or dtype.name not in DTYPES:
        return Foreign("a tensor of an unknown type")
    return _tensor(_Storage(storage.content, DTYPES[dtype.name]), offset, size, stride, None, None, *rest)


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return {key: value for key, value in pairs if type(key) in PLAIN_KEYS}


def _first(value: Any, *_: Any) -> Any:
    return value


def _typed(function: Any, kind: Any, arguments: Any, state: Any) -> None:
    """Stands for `_rebuild_from_type_v2`, which calls another function of this table."""


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
