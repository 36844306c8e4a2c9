import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.harness import (
    SHORTEST_SAMPLE,
    Budget,
    Candidate,
    Case,
    History,
    Row,
    compare,
    cpu_threads,
    peak_rise,
    rotated,
    run_python,
)
from benchmarks.options import BenchOptions, MatchingOptions, NmsOptions
from benchmarks.report import default_output, growth, hardware, hardware_name, short_count, short_time, table
from detkit.errors import DetkitError


class FakeClock:
    """Notes who is called, and takes the seconds it is told to, one entry a sample."""

    def __init__(self, log, name, seconds):
        self.log, self.name, self.seconds = log, name, iter(seconds)

    def __call__(self, call, repetitions):
        call()
        self.log.append((self.name, repetitions))
        return next(self.seconds) * repetitions


def fake(log, name, seconds, **more):
    return Candidate(name, lambda: name, FakeClock(log, name, seconds), **more)


def test_candidates_take_turns_and_the_median_is_taken():
    log = []
    candidates = [fake(log, "torchvision", [0.3, 0.4, 0.8, 0.5]), fake(log, "b", [0.2, 0.1, 0.3, 0.2])]
    rows = compare(candidates, lambda name, result: int(result != name), 100, Budget(3, 10.0))
    first_calls, rounds = "tb", ("tb", "bt", "tb")
    assert "".join(name[0] for name, _ in log) == first_calls + "".join(rounds)
    assert rows[0].samples_us == pytest.approx([400e3, 800e3, 500e3])  # the first call is no sample
    assert (rows[0].median_us, rows[1].median_us) == pytest.approx((500e3, 200e3))
    assert (rows[0].ratio, rows[1].ratio) == pytest.approx((1, 2.5))
    assert rows[1].rate == pytest.approx(100 / 0.2)
    assert [row.differences for row in rows] == [0, 0]


def test_rounds_begin_with_the_next_candidate():
    candidates = [Candidate(name, list) for name in "abc"]
    orders = ["".join(candidate.name for candidate in rotated(candidates, number)) for number in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]
    assert rotated([], 3) == []


def test_short_calls_are_repeated_within_a_sample():
    log = []
    (row,) = compare([fake(log, "a", [1e-3, 9e-5, 3e-5, 2e-5])], lambda *_: None, 1, Budget(1, 1.0))
    assert row.repetitions == math.ceil(SHORTEST_SAMPLE / 3e-5)
    assert log[-1] == ("a", row.repetitions)
    assert row.median_us == pytest.approx(20)


def test_a_call_longer_than_its_time_is_one_sample_and_others_go_on():
    log = []
    candidates = [fake(log, "slow", [5.0]), fake(log, "fast", [0.1] * 9)]
    slow, fast = compare(candidates, lambda *_: 0, 10, Budget(8, 0.35))
    assert slow.samples_us == [5e6]
    assert len(fast.samples_us) == 4  # 0.4 s: the time is up after it


def test_what_compiles_is_called_before_it_is_timed():
    calls = []
    compare(
        [Candidate("a", lambda: calls.append(1), lambda call, n: call() or 1.0, compiles=True)],
        lambda *_: 0,
        1,
        Budget(1, 0.5),
    )
    assert len(calls) == 2


def test_a_slow_peer_is_left_out_and_says_so():
    history = History()
    history.add("peer", 10, 0.01)
    history.add("peer", 100, 1.0)
    assert history.at_least("peer", 500) == pytest.approx(5)
    assert history.at_least("unknown", 500) == 0
    candidates = [fake([], "torchvision", [3.0]), fake([], "peer", [], may_be_left_out=True)]
    reference, peer = compare(candidates, lambda *_: 0, 500, Budget(1, 1.0, limit=4), history)
    assert peer.median_us is None
    assert peer.left_out == "over 4 s: at least 5.0 s a call, judged by the size below"
    assert reference.ratio == 1
    (peer,) = compare([fake([], "peer", [3.0], may_be_left_out=True)], lambda *_: 0, 300, Budget(1, 1.0, 4), history)
    assert peer.median_us == 3e6


def test_an_error_of_the_check_stops_the_case():
    def check(name, result):
        raise DetkitError("wrong")

    with pytest.raises(DetkitError, match="wrong"):
        compare([fake([], "detkit", [0.1])], check, 1, Budget(1, 1.0))


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_memory_of_a_call():
    peak = peak_rise(lambda: torch.ones(20_000_000))
    assert peak is None or 70e6 < peak < 100e6


def test_a_process_that_fails_is_an_error():
    assert run_python("print([1, 2])") == [1, 2]
    with pytest.raises(DetkitError, match="ZeroDivisionError"):
        run_python("1 / 0")


def test_hardware_names_the_machine():
    found = hardware()
    json.dumps(found)
    assert found["cpu"]
    assert found["cores"] >= 1
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert {"instruction_sets", "memory_gb", "gpu", "os", "python", "cuda"} <= set(found)
    assert {"torchvision", "numba", "opencv", "lsnms", "powerboxes"} <= set(found["versions"])
    assert found["cpu"] in hardware_name(found)


def test_default_output():
    machine = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 2, "gpu": "NVIDIA H200"}
    found = default_output("nms", machine)
    assert found.name == "nms-intel-xeon-cpu-2-cores-nvidia-h200.json"
    assert found.parent == Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("cpu", "number", "name"),
    [
        ("AMD EPYC", "family 25 model 17", "nms-amd-epyc-family-25-model-17-2-cores.json"),
        ("AMD EPYC", "family 26 model 2", "nms-amd-epyc-family-26-model-2-2-cores.json"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "family 6 model 85", "nms-intel-xeon-cpu-family-6-model-85-2-cores.json"),
        ("Intel(R) Xeon(R) Platinum 8488C", "family 6 model 143", "nms-intel-xeon-platinum-8488c-2-cores.json"),
        ("AMD EPYC", None, "nms-amd-epyc-2-cores.json"),
    ],
)
def test_machines_of_one_name_do_not_share_a_file(cpu, number, name):
    machine = {"cpu": cpu, "cpu_model_number": number, "cores": 2, "gpu": None}
    assert default_output("nms", machine).name == name


def case(work, **medians):
    rows = [Row(name, median_us=median, rate=1.0, differences=0) for name, median in medians.items()]
    return Case("detector", "cpu", str(work), work, rows, {"kept": work // 2})


def test_growth_is_of_the_largest_tenfold_pair():
    cases = [case(10, a=1.0), case(30, a=2.0), case(100, a=15.0, b=3.0), case(300, a=70.0)]
    assert growth(cases) == {"from": 30, "to": 300, "factor": {"a": 35.0}}
    assert growth(cases[:2]) is None


def test_table_shows_everything_once():
    from rich.console import Console

    cases = [case(10, detkit=10.0, peer=2000.0), case(100, detkit=150.0, peer=3e6)]
    cases[1].rows[1] = Row("peer", left_out="over 4 s: about 9 s a call")
    cases[0].rows[1].differences = 7
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table("detector on cpu", cases, "boxes", ["kept"]))
    text = " ".join(capture.get().split())
    for part in ("kept 5 50", "detkit 10.0 µs 150 µs x 15.0", "peer 2.00 ms over 4 s", "entries that differ peer 7"):
        assert part in text


def test_numbers_are_short():
    assert [short_time(value) for value in (1.234, 12.34, 123.4, 999.7, 1234, 5.4e6)] == [
        *("1.23 µs", "12.3 µs", "123 µs", "1.00 ms", "1.23 ms", "5.40 s")
    ]
    assert [short_count(value) for value in (100, 1000, 30_000, 999_700, 7.72e6)] == [
        *("100", "1k", "30k", "1M", "7.72M")
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BenchOptions(rounds=0), "--rounds must be at least 1"),
        (lambda: BenchOptions(seconds=math.nan), "--seconds must be at least 0"),
        (lambda: BenchOptions(device="gpu"), "--device must be auto, cpu or cuda, but is 'gpu'"),
        (lambda: NmsOptions(iou=2), r"--iou must be in 0..1"),
        (lambda: NmsOptions(sizes="10,x").box_counts, "--sizes holds 'x'"),
        (lambda: NmsOptions(sizes="0").box_counts, "--sizes holds '0'"),
        (lambda: MatchingOptions(sizes="10").shapes, "--sizes holds '10', which is not two numbers"),
    ],
)
def test_options_that_make_no_sense(make, message):
    with pytest.raises(DetkitError, match=message):
        make()


def test_quick_gives_way_to_what_is_asked_for():
    quick = NmsOptions(quick=True)
    assert (quick.box_counts, quick.round_count) == ([100, 1000, 10000], 7)
    asked = NmsOptions(quick=True, sizes="50,20,50", rounds=2, seconds=3)
    assert (asked.box_counts, asked.round_count, asked.sample_seconds) == ([20, 50], 2, 3)
