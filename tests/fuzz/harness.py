"""Fuzz every reader of detkit, and count how each input ended: python tests/fuzz/harness.py --inputs 1000

Each input is a valid file after a few random mutations. It must end in valid data or in detkit's own error, within 5
seconds of processor time (20 by the clock) and 1 GB, without a side effect: no process, no connection, no file written
outside the working folder.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from mutations import mutate
from readers import READERS

from detkit.errors import DetkitError

SECONDS, BYTES, MESSAGE = 5.0, 10**9, 2100
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class Watch:
    """Records what an input does beside being read, by Python's audit events."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)  # stays for the life of the process, and does nothing without a folder

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments[:1]}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)) and arguments[2] & WRITING:
            path = os.fsdecode(arguments[0])
            allowed = path.startswith((str(self.folder), "/dev/null", "/proc/"))
            self.seen += [] if allowed else [f"writes {path}"]


def run_one(read: Any, watch: Watch, folder: Path) -> tuple[str, str]:
    """How reading ended: "valid", the name of detkit's error, or FAULT with its kind; and what is known about it."""
    watch.folder, watch.seen = folder, []
    before = _reset_peak()
    started = time.process_time()  # of all threads, which does not depend on what else the machine does
    try:
        with _alarm():
            read()
        outcome, detail = "valid", ""
    except DetkitError as error:
        outcome, detail = type(error).__name__, str(error)
        if len(detail) > MESSAGE:
            outcome, detail = "FAULT long message", f"{len(detail)} characters: {detail[:200]}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"FAULT {type(error).__name__}"
        detail = f"{str(error)[:300]} at {Path(place.filename).name}:{place.lineno}"
    finally:
        watch.folder = None
    seconds = time.process_time() - started
    if watch.seen:
        return "FAULT side effect", "; ".join(watch.seen[:3])
    if seconds > SECONDS:
        return "FAULT slow", f"{seconds:.1f} s, {outcome}: {detail[:200]}"
    if (grown := _peak() - before) > BYTES:
        return "FAULT memory", f"{grown / 1e9:.1f} GB, {outcome}: {detail[:200]}"
    return outcome, detail


def fuzz(name: str, inputs: int, seed: int, keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Read `inputs` mutated files through one reader.

    Args:
        keep: a folder for the inputs that ended in a fault.

    Returns:
        The count of each outcome, and a line for each kind of fault with an example.
    """
    counts: Counter[str] = Counter()
    faults: dict[tuple[str, str], str] = {}
    watch = Watch()
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="fuzz", dir=base))
    try:
        case = READERS[name](folder)
        seeds = list(case.seeds)
        for seed_content in seeds:
            case.path.write_bytes(seed_content)
            run_one(case.read, watch, folder)  # imports and compiles, which is not the input's doing
        for number in range(inputs):
            rng = random.Random(zlib.crc32(f"{name} {seed} {number}".encode()))
            content = mutate(rng.choice(seeds), seeds, rng)
            case.path.write_bytes(content)
            outcome, detail = run_one(case.read, watch, folder)
            counts[outcome] += 1
            if outcome.startswith("FAULT"):
                key = (outcome, detail.rpartition(" at ")[2])
                if key not in faults and keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{name}-{seed}-{number}").write_bytes(content)
                faults.setdefault(key, f"{name} seed {seed} input {number}: {outcome}: {detail}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts, list(faults.values())


class Timeout(BaseException):
    """Raised inside an input that takes far too long."""


@contextmanager
def _alarm() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Timeout("stopped")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _reset_peak() -> int:
    """Set the peak of the resident memory to what is resident now; bytes."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return _peak()
    return _peak()


def _peak() -> int:
    return _status("VmHWM:")


def _record(path: Path, results: dict[str, Any]) -> None:
    """Add counts to those of earlier runs in a JSON file."""
    readers = json.loads(path.read_text())["readers"] if path.exists() else {}
    for name, result in results.items():
        before = readers.setdefault(name, {"inputs": 0, "seconds": 0.0, "outcomes": {}})
        before["inputs"] += result["inputs"]
        before["seconds"] = round(before["seconds"] + result["seconds"], 1)
        before["outcomes"] = dict((Counter(before["outcomes"]) + Counter(result["outcomes"])).most_common())
    total: Counter[str] = Counter()
    for result in readers.values():
        total.update(result["outcomes"])
    record = {
        "command": "python tests/fuzz/harness.py --inputs N --seed S --json FILE, several times",
        "hardware": f"{_processor()}, {os.cpu_count()} cores",
        "inputs": sum(total.values()),
        "outcomes": dict(total.most_common()),
        "readers": readers,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="for each reader")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="add the counts to those in this file")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that ended in a fault")
    options = parser.parse_args()
    results, status = {}, 0
    for name in options.readers:
        started = time.perf_counter()
        counts, faults = fuzz(name, options.inputs, options.seed, options.keep)
        seconds = time.perf_counter() - started
        results[name] = {"inputs": options.inputs, "seconds": round(seconds, 1), "outcomes": dict(counts.most_common())}
        print(f"{name:12} {options.inputs:8} inputs {seconds:7.1f} s  {dict(counts.most_common())}", flush=True)
        for fault in faults:
            print(f"    {fault}", flush=True)
        status |= bool(faults)
    if options.json is not None:
        _record(options.json, results)
    return status


if __name__ == "__main__":
    sys.exit(main())
