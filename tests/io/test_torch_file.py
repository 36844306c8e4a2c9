"""Files of torch.save: the same values as torch.load, and nothing that a file names runs, is made or takes memory."""

import ast
import datetime
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import detkit
from detkit.errors import CheckpointError
from detkit.io.torch_file import LEGACY_MAGIC, Foreign, read_torch

PACKAGE = Path(__file__).parents[2] / "detkit"
BASE = torch.arange(24.0).reshape(4, 6)


def same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs):
            same(mine, other)
    else:
        assert (type(ours), ours) == (type(theirs), theirs)


def training() -> dict[str, Any]:
    """What a resumed training needs: weights, an optimiser's state, numbers, text."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.rand(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {
        "model": dict(network.state_dict()),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "progress": {"epoch": 3, "best": 0.1 + 0.2, "name": "é", "done": False, "none": None, "large": 2**70, "n": -5},
    }


TENSORS = {
    "transposed": BASE.t(), "slice": BASE[1:3, 2:], "empty": torch.zeros(0, 3), "scalar": torch.tensor(3),
    "half": BASE.half(), "bf16": BASE.bfloat16(), "double": BASE.double(), "bool": BASE > 3, "int8": BASE.char(),
    "complex": BASE.to(torch.complex64), "parameter": nn.Parameter(BASE.clone()), "shared": BASE, "again": BASE,
    "expanded": torch.ones(1).expand(5), "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
}  # fmt: skip
NEW_TYPES = {"uint16": BASE.to(torch.uint16), "float8": BASE.to(torch.float8_e4m3fn)}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_same_values_as_torch(zipped: bool, protocol: int, tmp_path: Path) -> None:
    content = {"training": training(), "tensors": TENSORS, "new": NEW_TYPES if zipped else {}, "size": BASE.shape}
    path = tmp_path / "x.pt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    expected = {**content, "size": tuple(BASE.shape)}
    same(read_torch(path), expected)
    if protocol == 2:
        same({**torch.load(path, weights_only=True), "size": tuple(BASE.shape)}, expected)


def test_shared_memory_stays_shared(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"a": BASE, "b": BASE[1]}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        found = read_torch(tmp_path / "x.pt")
        found["a"][1, 0] = 99
        assert found["b"][0] == 99


def test_objects_beside_the_tensors_are_left_out(tmp_path: Path) -> None:
    """Training programs save their best score as a number of NumPy, their options as a Namespace."""
    import argparse

    path = tmp_path / "x.pth"
    others = {
        "score": np.float64(0.5), "array": np.ones(3), "options": argparse.Namespace(lr=1), "path": Path("x"),
        "date": datetime.date(2024, 1, 1), "set": {1}, "counter": Counter("ab"), ("a", 1): 2,
    }  # fmt: skip
    torch.save({"w": BASE, "ordered": OrderedDict(a=1), **others}, path)
    found = read_torch(path)
    assert torch.equal(found.pop("w"), BASE)
    assert found.pop("ordered") == {"a": 1}
    assert found.pop(next(key for key in found if isinstance(key, Foreign))) == 2
    assert found["score"].name.endswith("multiarray.scalar")
    assert found["options"].name == "argparse.Namespace"
    assert all(type(value) is Foreign for value in found.values())


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.result = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.result


class Nasty(nn.Module):
    """A whole model whose state runs a command."""

    def __init__(self, command: Call) -> None:
        super().__init__()
        self.command = command


def text_pickle(*lines: str) -> bytes:
    return "\n".join(lines).encode()


def legacy(pickled: bytes, keys: bytes | None = None, rest: bytes = b"") -> bytes:
    """A file as PyTorch before 1.6 wrote it, around the bytes of a pickle."""
    head = [LEGACY_MAGIC, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(value, 2) for value in head) + pickled + (keys or pickle.dumps([], 2)) + rest


def archive(pickled: bytes, parts: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save writes it, around the bytes of a pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in {"version": b"3\n", **(parts or {})}.items():
            file.writestr(f"archive/{name}", content)
    return stream.getvalue()


def dangerous(marker: Path) -> dict[str, bytes]:
    """Files each of which would write `marker` if it was opened by pickle."""
    command = f"touch {marker}"
    system = Call(os.system, command)
    stream = io.BytesIO()
    torch.save({"w": BASE, "run": system}, stream)
    whole = io.BytesIO()
    torch.save(Nasty(system), whole)
    module = f"cposix\nsystem\n(S'{command}'\ntR."
    files = {
        "system": stream.getvalue(),
        "whole model": whole.getvalue(),
        "raw pickle": pickle.dumps({"w": 1, "run": system}, 2),
        "protocol 0": text_pickle(module),
        "instance": legacy(b"(S'" + command.encode() + b"'\niposix\nsystem\n."),
        "object": legacy(b"(cposix\nsystem\nS'" + command.encode() + b"'\no."),
        "stack global": legacy(pickle.dumps(system, 4)),
        "eval": archive(pickle.dumps(Call(eval, f"__import__('os').system({command!r})"), 2)),
        "state": archive(pickle.dumps(Call(OrderedDict, state={"x": system}), 2)),
        "key": archive(pickle.dumps({"w": {Call(os.system, command): 1}}, 2)),
        "storage": archive(b"(S'storage'\ncposix\nsystem\nS'0'\nS'cpu'\nI1\ntQ."),
        "reduced storage": archive(b"cposix\nsystem\n(S'" + command.encode() + b"'\ntRQ."),
        "open": archive(pickle.dumps(Call(open, str(marker), "w"), 2)),
        "load": archive(pickle.dumps(Call(torch.load, str(marker)), 2)),
        "copyreg": archive(text_pickle("ccopyreg", "_reconstructor", f"({module[:-1]}tR.")),
        # numpy.dtype('O') and bytes: an object at an address from the file
        "numpy": archive(
            pickle.dumps({"w": Call(type(np.float64(0)).__reduce__(np.float64(0))[0], np.dtype("O"), b"A" * 8)}, 2)
        ),
        "builders": archive(
            b"ctorch._utils\n_rebuild_tensor_v2\n(cposix\nsystem\nI0\n(I1\nt(I1\ntI00\nNtR."
        ),
        "typed": archive(
            b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nN(S'" + command.encode() + b"'\ntNtR."
        ),
    }  # fmt: skip
    script = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), script)
    return {**files, "torchscript": script.getvalue()}


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_nothing_in_a_file_runs(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    files = dangerous(marker)
    os.system(f"touch {marker}")  # the command does what it is feared for
    assert marker.is_file()
    marker.unlink()
    for name, content in files.items():
        for ending in (".pth", ".pt", ".weights", ".bin", ""):
            path = tmp_path / f"file{ending}"
            path.write_bytes(content)
            with pytest.raises(CheckpointError) as caught:
                detkit.load(path)
            assert str(path) in str(caught.value), name
            assert str(caught.value).isprintable(), name
            assert not marker.exists(), name
            path.unlink()


def storage(count: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return f"(S'storage'\nctorch\n{kind}\nS'{key}'\nS'cpu'\nI{count}\ntQ".encode()


def tensor(stored: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, dict_of: bool = True) -> bytes:
    def shape(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"I%d\n" % value for value in values) + b"t"

    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(stored) + b"I%d\n" % offset + shape(size) + shape(stride)
    made += b"I00\nNtR"
    return b"}S'w'\n" + made + b"s." if dict_of else made + b"."


def nested_key(levels: int) -> bytes:
    """A dict whose key is a tuple of a tuple twice, and so on: to hash it takes 2 to the power of `levels` steps."""
    return b"}I1\n\x85" + b"2\x86" * levels + b"Ns."


GREEDY = {
    "claimed bytes": archive(tensor(10**12, (10**12,), (1,)), {"data/0": bytes(4)}),
    "claimed bytes, legacy": legacy(tensor(10**11, (10**11,), (1,)), pickle.dumps(["0"], 2), struct.pack("<q", 10**11)),
    "many claims": archive(
        b"]" + b"".join(storage(2**28, str(number)) + b"a" for number in range(99)) + b".", {"data/0": b""}
    ),
    "compressed": archive(tensor(2**28, (2**28,), (1,)), {"data/0": bytes(2**30)}, zipfile.ZIP_DEFLATED),
    "compressed pickle": archive(b"]" * 2**28 + b".", compression=zipfile.ZIP_DEFLATED),
    "beyond the storage": archive(tensor(1, (10**9,), (1,)), {"data/0": bytes(4)}),
    "far offset": archive(tensor(1, (1,), (1,), offset=2**62), {"data/0": bytes(4)}),
    "negative": archive(tensor(1, (1,), (-1,)), {"data/0": bytes(4)}),
    "negative size": archive(tensor(1, (-1,), (1,)), {"data/0": bytes(4)}),
    "repeated": archive(tensor(1, (10**9, 10**9), (0, 0)), {"data/0": bytes(4)}),
    "overflow": archive(tensor(1, (2**63, 2**63), (2**63, 1)), {"data/0": bytes(4)}),
    "bytearray": archive(b"cbuiltins\nbytearray\n(I10000000000\ntR."),
    "new tensor": archive(b"ctorch\nTensor\n(I100000\nI100000\ntR."),
    "new storage": archive(b"ctorch.storage\nUntypedStorage\n(I10000000000\ntR."),
    "memo": archive(b"Nr\xff\xff\xff\x7f."),
    "text": archive(b"\x8d" + struct.pack("<q", 2**62) + b"x."),
    "bytes": archive(b"\x8e" + struct.pack("<q", 2**40) + b"x."),
    "text, legacy": legacy(b"X" + struct.pack("<I", 2**32 - 1) + b"x."),
    "hash": archive(nested_key(200)),
    "steps": archive(b"]" * 2_000_000 + b"."),
    "depth": archive(b"]" + b"]" * 500_000 + b"a" * 500_000 + b"."),
    "encode": archive(
        b"c_codecs\nencode\nq\x00X" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"\x85q\x01"
        + b"h\x00h\x01R" * 300_000 + b"."
    ),
    "ordered": archive(
        b"ccollections\nOrderedDict\nq\x00(" + b"(NNt" * 9999 + b"l\x85q\x01" + b"h\x00h\x01R" * 99999 + b"."
    ),
}  # fmt: skip


def test_a_small_file_takes_little_memory_and_time(tmp_path: Path) -> None:
    """In a process of its own, which may have 1 GB more than after its imports."""
    for number, content in enumerate(GREEDY.values()):
        (tmp_path / f"{number}.pth").write_bytes(content)
    code = (
        "import resource, sys\nfrom pathlib import Path\nimport detkit.published.read as read\n"
        "from detkit.errors import CheckpointError\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"for number in range({len(GREEDY)}):\n"
        f"    try:\n        read.read_published(f'{tmp_path}/{{number}}.pth')\n"
        "        print(number, 'was accepted')\n"
        "    except CheckpointError:\n        pass\n"
        "    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start\n"
        "    if more > 1_000_000:\n        print(number, more)\n"
    )
    # Some of these would run for years.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=1800)
    names = list(GREEDY)
    assert result.returncode == 0, result.stderr
    assert not result.stdout, [names[int(line.split()[0])] + line for line in result.stdout.splitlines()]


def test_damage_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """Cut and changed at many places: the right values, or one paragraph."""
    random = np.random.default_rng(0)
    path = tmp_path / "own.pth"
    messages = []
    for zipped in (True, False):
        torch.save(training(), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for number in range(300):
            content = bytearray(whole)
            if number % 3 == 0:
                del content[random.integers(len(content)) :]
            else:
                for place in random.integers(len(content), size=1 + number % 5):
                    content[place] = random.integers(256)
            path.write_bytes(content)
            try:
                read_torch(path)
            except CheckpointError as error:
                messages.append(str(error))
    assert all("own.pth" in message and message.isprintable() and len(message) < 1000 for message in messages)
    assert len(messages) > 250


def test_one_flipped_bit_in_a_tensor_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    torch.save({"w": BASE}, path)
    content = bytearray(path.read_bytes())
    content[content.index(BASE.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"own\.pth' is damaged or truncated \(BadZipFile: Bad CRC"):
        read_torch(path)


def test_escape_codes_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m.pth"
    path.write_bytes(archive(b"c\x1b[2J\nevil\n."))
    with pytest.raises(CheckpointError) as caught:
        detkit.load(path)
    assert str(caught.value).isprintable()


def test_nothing_else_opens_a_pickle() -> None:
    """torch.load, pickle.load, numpy.load and others run what a file says, or can be told to."""
    calls = {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load"}
    calls |= {"joblib.load", "dill.load", "dill.loads", "torch.serialization.add_safe_globals", "marshal.loads"}
    calls |= {"torch.serialization.safe_globals", "torch.hub.load_state_dict_from_url", "torch.hub.load"}
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in calls
    ]
    # Which its own workers write.
    assert [item.partition(":")[0] for item in found] == ["data/shared_batches.py"], found
