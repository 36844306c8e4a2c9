"""The tables of docs/pages/benchmarks.md are made from the results that are committed, and from nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tables import rewrite, tables, with_tables
from detkit.errors import DetkitError

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "A CPU", "cpu_model_number": "family 7 model 8", "cores": 2, "gpu": None}
NAMES = ("inference", "yolo", "train_step", "learning", "scaling")
EMPTY = dict.fromkeys(NAMES, "")


def test_the_page_has_the_tables_of_the_results_that_are_committed() -> None:
    text = (ROOT / "docs" / "pages" / "benchmarks.md").read_text(encoding="utf-8")
    assert with_tables(text, tables(ROOT / "benchmarks" / "results")) == text, "run python -m benchmarks tables"


def write(folder: Path, name: str, benchmark: str, cases: list[dict[str, Any]], **more: Any) -> None:
    record = {
        "benchmark": benchmark,
        "date": more.pop("date", "2026-01-01T00:00:00+00:00"),
        "hardware": MACHINE | more.pop("hardware", {}),
        "options": {"threads": 2, "quick": False, **more.pop("options", {})},
        "images": "a.png",
        "cases": cases,
        **more,
    }
    (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")


def row(name: str, ms: float, peak: int | None = None) -> dict[str, Any]:
    return {"name": name, "median_us": ms * 1e3, "peak_bytes": peak}


def case(kind: str, rows: list[dict[str, Any]], work: int = 1, **facts: Any) -> dict[str, Any]:
    return {"kind": kind, "device": "cpu", "size": "300 px", "work": work, "rows": rows, "facts": facts}


def rows_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_runs_of_one_machine_are_one_table_and_the_latest_counts(tmp_path: Path) -> None:
    def ssd(theirs: float, mine: float) -> list[dict[str, Any]]:
        return [row("torchvision", theirs, 302_000_000), row("detkit", mine, 246_000_000)]

    said = "cpu, {}, channels_last, 3 batch norms folded, {}"
    write(tmp_path, "a", "inference", [case("ssd300_vgg16", ssd(600, 400), 2)], options={"precision": "fp32"})
    write(
        *(tmp_path, "b", "inference"),
        [case("ssd300_vgg16", ssd(300, 50), 1, choices=said.format("bf16 (AMX)", "compiled"))],
        date="2026-01-02",
    )
    write(
        *(tmp_path, "c", "inference"),
        [
            case("ssd300_vgg16", ssd(290, 145), 1, choices=said.format("fp32", "not compiled")),
            case("retinanet_resnet50_fpn", ssd(1000, 500), 1, choices=said.format("fp32", "not compiled")),
        ],
        date="2026-01-03",
    )
    write(tmp_path, "d", "inference", [case("ssd300_vgg16", ssd(1, 1))], options={"quick": True}, date="2026-01-09")
    write(tmp_path, "e", "nms", [])
    (tmp_path / "f.json").write_text('{"command": "another program", "seconds": 1}', encoding="utf-8")
    table = tables(tmp_path)["inference"]
    assert rows_of(table) == [
        ["an image", "", "torchvision", "detkit, fp32", "detkit, bf16, compiled"],
        ["`ssd300_vgg16`, 300 px", "time", "290 ms", "145 ms (2.00x)", "50.0 ms (6.00x)"],
        ["", "peak memory", "302MB", "246MB", "246MB"],
        ["`retinanet_resnet50_fpn`, 300 px", "time", "1.00 s", "500 ms (2.00x)", ""],
        ["", "peak memory", "302MB", "246MB", ""],
    ]
    assert "A CPU, 2 cores (family 7 model 8), 2 threads; a.png ([a](../../benchmarks/results/a.json), [b](" in table


def test_machines_threads_and_images_have_tables_of_their_own(tmp_path: Path) -> None:
    cases = [case("ssd300_vgg16", [row("torchvision", 20), row("detkit", 10)])]
    write(tmp_path, "a", "train_step", cases)
    write(tmp_path, "b", "train_step", cases, hardware={"cpu_model_number": None})
    write(tmp_path, "c", "train_step", cases, options={"threads": 1})
    write(tmp_path, "d", "train_step", cases, images="b.png")
    write(tmp_path, "e", "train_step", cases, hardware={"gpu": "A GPU"})
    table = tables(tmp_path)["train_step"]
    assert table.count("| a step |") == 5
    for part in ("A CPU, 2 cores, 2 threads;", "1 thread;", "; b.png", "A CPU, 2 cores, A GPU (family 7 model 8)"):
        assert part in table
    assert "memory" not in table


def test_a_yolo_stands_beside_its_peer(tmp_path: Path) -> None:
    rows = [row("ultralytics", 600), row("detkit", 200), row("detkit, fp32", 400)]
    facts = {
        "choices": {"detkit": "cpu, bf16 (AMX), x, compiled", "detkit, fp32": "cpu, fp32, x, not compiled"},
        "peer": {"model": "yolov8s.yaml", "version": "9", "gflops": 28.8},
        "gflops": 26.8,
    }
    write(tmp_path, "a", "inference", [case("yolox_s", rows, 3, **facts)])
    assert rows_of(tables(tmp_path)["yolo"]) == [
        ["an image, from its file", "", "ultralytics", "detkit, fp32", "detkit, bf16, compiled"],
        [
            "`yolox_s` (26.8 GFLOPs) beside yolov8s (28.8 GFLOPs), 300 px",
            *("time", "200 ms", "133 ms (1.50x)", "66.7 ms (3.00x)"),
        ],
    ]
    assert tables(tmp_path)["inference"] == ""


def test_without_a_peer_there_is_no_ratio(tmp_path: Path) -> None:
    facts = {"choices": {"detkit": "cpu, fp32, x, not compiled"}, "peer": None}
    write(tmp_path, "a", "inference", [case("yolox_s", [row("detkit", 200)], **facts)])
    assert rows_of(tables(tmp_path)["yolo"])[1] == ["`yolox_s`, 300 px", "time", "200 ms"]


def test_losses_of_the_seeds(tmp_path: Path) -> None:
    ends = {"torchvision": [1.0, 2.0, 3.0], "detkit": [1.1, 2.1, 3.1]}
    write(tmp_path, "a", "learning", [case("ssd300_vgg16", [], ends=ends)], options={"precision": "bf16", "steps": 50})
    table = tables(tmp_path)["learning"]
    assert "detkit in bf16" in table
    assert rows_of(table)[1] == ["`ssd300_vgg16`, 300 px", "50", "1.000, 2.000, 3.000", "1.100, 2.100, 3.100"]


def test_growth(tmp_path: Path) -> None:
    cases = [{**case("classes", []), "size": size} for size in ("20", "100", "1,000")]
    growth = {"prediction": {"time": {"all": 0.1, "last": 0.456}}, "post-processing": {"memory": {"last": -0.001}}}
    write(tmp_path, "a", "scaling", cases, growth={"classes, cpu": growth})
    assert rows_of(tables(tmp_path)["scaling"]) == [
        ["grows with", "from, to", "prediction: time, memory", "post-processing: time, memory"],
        ["classes, cpu", "20, 1,000", "0.46, -", "-, 0.00"],
    ]


def test_a_folder_without_results_leaves_the_places_empty(tmp_path: Path) -> None:
    assert tables(tmp_path) == EMPTY


PLACES = "".join(f"Before.\n<!-- benchmarks/tables.py: {name} -->\nold\n<!-- end -->\nBetween.\n" for name in NAMES)


def test_a_table_replaces_what_stands_in_its_place(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(PLACES)
    write(tmp_path, "a", "train_step", [case("ssd300_vgg16", [row("torchvision", 20), row("detkit", 10)])])
    assert rewrite(page, tmp_path)
    text = page.read_text()
    assert "old" not in text
    assert text.count("Before.\n") == text.count("Between.\n") == 5
    assert "10.0 ms (2.00x) |\n<!-- end -->" in text
    assert not rewrite(page, tmp_path)


@pytest.mark.parametrize(
    "text", [PLACES.replace(": scaling", ": scalin"), PLACES.replace("<!-- end -->\n", "", 1), PLACES + PLACES, ""]
)
def test_a_place_that_is_unknown_or_missing_is_an_error(text: str) -> None:
    with pytest.raises(DetkitError, match=r"A place is a line <!-- benchmarks/tables\.py: NAME -->"):
        with_tables(text, EMPTY)
