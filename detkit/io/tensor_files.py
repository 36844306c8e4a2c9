"""Reader of named tensors from torch.save and safetensors files; the format is detected by content, not by suffix."""

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from detkit.errors import CheckpointError, printable
from detkit.io.torch_file import Foreign, one_line, read_torch

NAME_LENGTH = 300
DEPTH = 3
"""Levels of nested dicts that are searched for a state dict."""
WRAPPER = re.compile(r"module\.|_orig_mod\.|model\.")
"""Prefixes that DataParallel, torch.compile and Lightning add to every name."""
SIGNATURES = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as written by Keras"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"version https://git-lfs", "a Git LFS pointer; get the file by `git lfs pull`"),
    (0, b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (0, b"BZh", "compressed with bzip2; unpack it first"),
    (0, b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x08\x01\x12", "a TensorFlow SavedModel"),
    (0, b"<", "a web page or an XML file; was it saved instead of the file of weights?"),
    (0, b"{", "a JSON file"),
)
"""(offset, bytes, description) of other formats that may be mistaken for a file of weights."""
ONNX = re.compile(rb"\x08[\x03-\x1f][\x12\x1a\x22\x28\x3a\x42]", re.DOTALL)
PROTOCOL_BUFFERS = re.compile(rb"\x0a[\x01-\xff]+[\x0a\x12]", re.DOTALL)
DARKNET_VERSION = 10
FORMATS = {
    "safetensors": "a safetensors file",
    "torch": "a torch.save file, or another zip archive or pickle",
    "darknet": "a Darknet weight file",
}
"""The formats that `file_format` detects and detkit reads, with descriptions."""
TENSOR_FORMATS = ("safetensors", "torch")
"""The FORMATS that `read_tensors` reads."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the named tensors of a torch.save or safetensors file to the CPU, checking that they are finite.

    The state dict inside a training checkpoint, such as {"state_dict": ..., "epoch": 3}, is found if it is the only
    one. Prefixes that DataParallel (module.), torch.compile (_orig_mod.) or Lightning (model.) added to all names are
    removed.

    Raises:
        CheckpointError: there is no such file, it has another format, is damaged, or does not contain exactly one dict
            of tensors; the message names the file.
    """
    where = f"The file of weights '{printable(str(path))}'"
    kind = file_format(path)
    if kind not in TENSOR_FORMATS:
        raise CheckpointError(
            f"{where} is {FORMATS.get(kind, kind)}. Give a .safetensors file, or one written by "
            f"torch.save(model.state_dict(), FILE)."
        )
    file = Path(path).expanduser()
    state = _read_safetensors(file, where) if kind == "safetensors" else _state_dict(read_torch(file), where)
    for name, tensor in state.items():
        _check(name, tensor, where)
    return _unwrapped(state)


def file_format(path: str | Path) -> str:
    """Detect the format of a file by its content: a key of FORMATS, or a description such as "an ONNX model".

    Raises:
        CheckpointError: there is no such file, or it is empty or cannot be read.
    """
    file = Path(path).expanduser()
    shown = printable(str(path))
    try:
        if not file.is_file():
            raise CheckpointError(
                f"There is no file of weights '{shown}' (searched at {printable(str(file.absolute()))})."
            )
        with file.open("rb") as stream:
            start = stream.read(512)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The file of weights '{shown}' cannot be read: {one_line(error)}.") from None
    if not start:
        raise CheckpointError(f"The file of weights '{shown}' is empty. Get a complete copy of it.")
    return _format_of(start)


def of_detkit(path: str | Path) -> bool:
    """Return whether a safetensors file is a detkit checkpoint or damaged; False for tensors of other programs."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "experiment" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True


def _format_of(start: bytes) -> str:
    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < 2**32:
        return "safetensors"
    if start.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", start):
        return "torch"
    for offset, content, words in SIGNATURES:
        if start.lstrip().startswith(content) if content in (b"<", b"{") else start[offset:].startswith(content):
            return words
    if len(start) >= 12 and all(0 <= number < DARKNET_VERSION for number in struct.unpack("<3i", start[:12])):
        return "darknet"
    if ONNX.match(start):
        return "an ONNX model"
    if PROTOCOL_BUFFERS.match(start):
        return "a graph of TensorFlow, Caffe or another program that uses Protocol Buffers"
    return "of an unknown format (or truncated at its start)"


def _read_safetensors(file: Path, where: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    # Data types that PyTorch does not support raise KeyError.
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{where} is not a complete safetensors file ({one_line(error)}); it may be truncated. Get a complete copy."
        ) from None


def _state_dict(content: Any, where: str) -> dict[str, Tensor]:
    """Find the only dict of named tensors in the content of a torch.save file.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    level, seen = [("", content)], {id(content)}
    for _ in range(DEPTH):
        found = {path: state for path, value in level if (state := _as_state(value)) is not None}
        if len(found) > 1:
            raise CheckpointError(
                f"{where} contains several dicts of tensors: {_listed(found)}. Save only the one to use: "
                f"torch.save(torch.load(FILE){next(iter(found))}, 'weights.pth')."
            )
        if found:
            return next(iter(found.values()))
        level = list(_inside(level, seen))
    raise CheckpointError(
        f"{where} must contain one dict of named tensors, but contains {_describe(content)}. Save only the tensors: "
        f"torch.save(model.state_dict(), 'weights.pth')."
    )


def _as_state(value: Any) -> dict[str, Tensor] | None:
    """Return `value` without the entries of modules that are not tensors; None if it is not a state dict."""
    if not isinstance(value, dict):
        return None
    tensors = {name: item for name, item in value.items() if not str(name).endswith("_extra_state")}
    return tensors if tensors and all(isinstance(item, Tensor) for item in tensors.values()) else None


def _inside(level: list[tuple[str, Any]], seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Iterate over the dicts one level deeper that have text keys, each once."""
    for path, value in level:
        for key, item in value.items() if isinstance(value, dict) else ():
            if isinstance(key, str) and isinstance(item, dict) and id(item) not in seen:
                seen.add(id(item))
                yield f"{path}[{key[:NAME_LENGTH]!r}]", item


def _describe(content: Any) -> str:
    if isinstance(content, Foreign):
        return f"a whole pickled object ({printable(content.name)[:NAME_LENGTH]}), which detkit does not load"
    if not isinstance(content, dict):
        return f"a value of the type {type(content).__name__}"
    foreign = {f"'{key}' ({value.name})": value for key, value in content.items() if isinstance(value, Foreign)}
    if foreign:
        return f"a dict with pickled objects, which detkit does not load: {_listed(foreign)}"
    return f"a dict of {_listed(content)}" if content else "an empty dict"


def _listed(names: Mapping[Any, Any]) -> str:
    shown = [printable(str(name) if isinstance(name, (str, int)) else type(name).__name__)[:100] for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _check(name: Any, tensor: Tensor, where: str) -> None:
    """Raise CheckpointError if a tensor has an invalid name, type or value.

    Raises:
        CheckpointError: naming the tensor.
    """
    if not isinstance(name, str) or len(name) > NAME_LENGTH or name != printable(name) or "\n" in name:
        raise CheckpointError(
            f"{where} has a tensor with the name {printable(repr(name)[:100])}, which is not valid for a module. It is "
            f"damaged."
        )
    if tensor.is_complex() or tensor.is_quantized:
        raise CheckpointError(f"{where} has '{name}' of the type {tensor.dtype}; save it as float32.")
    check_values(name, tensor, where)


def check_values(name: str, tensor: Tensor, where: str) -> None:
    """Check for values that would make every output NaN.

    Raises:
        CheckpointError: a value is NaN or infinite, or a variance is negative.
    """
    values = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    if not values.isfinite().all() or (name.endswith("running_var") and (values < 0).any()):
        raise CheckpointError(
            f"{where} has values in '{name}' that are NaN, infinite or negative variances: it is damaged, or its "
            f"training diverged. Use another file."
        )


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that all names share."""
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    state = plain if len(plain) == len(state) else state
    if "n_averaged" in state and all(name == "n_averaged" or name.startswith("module.") for name in state):
        state = {name: tensor for name, tensor in state.items() if name != "n_averaged"}  # of AveragedModel
    while state and (found := WRAPPER.match(next(iter(state)))) and all(name.startswith(found[0]) for name in state):
        state = {name.removeprefix(found[0]): tensor for name, tensor in state.items()}
    return state
