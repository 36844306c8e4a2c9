"""The files that `detkit infer` and `detkit eval` write: none of the user's is overwritten, no two runs are mixed."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.cli import main
from detkit.data.formats.shapes import Shapes
from detkit.errors import DetkitError
from detkit.inference.images import image_ids, infer, result_names
from detkit.inference.paths import claimed_output, source_folder
from detkit.inference.predictor import Predictor
from detkit.io.files import safe_name
from detkit.model import build_model
from detkit.structures import ClassList
from detkit.tasks.drawing import write_image
from detkit.tasks.options import PredictOptions


@pytest.fixture
def predictor(tiny: Any) -> Predictor:
    torch.manual_seed(0)
    return Predictor(build_model(tiny(), Shapes("val", val_count=1).classes), "cpu")


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> Path:
    build_model(tiny(), Shapes("val", val_count=1).classes).save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def image(path: Path, side: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((side, side, 3), dtype=np.uint8)).save(path)
    return path


def enter(context: Any) -> None:
    with context:
        pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("files", "source", "output"),
    [
        (["videos/holiday.mp4"], "videos/holiday.mp4", "videos"),
        (["data/images/a.png", "data/labels/a.txt"], "data/images", "data"),
        (["data/images/a.png"], "data/images", "data"),
        (["data/a.png"], "data", "data"),
        (["data/a.png"], "data/a.png", "data/../data"),
        (["data/a.png"], "data/*.png", "linked"),
        (["data/deep/er/a.png"], "data/deep/*/*.png", "data"),
    ],
)
def test_a_folder_that_holds_the_source_is_refused_before_the_model_loads(
    files: list[str], source: str, output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            image(tmp_path / name)
        elif name.endswith(".mp4"):
            from fractions import Fraction

            from detkit.data.video import VideoWriter

            with VideoWriter(tmp_path / name, Fraction(25)) as writer:
                writer.write(np.zeros((32, 32, 3), dtype=np.uint8))
        else:
            (tmp_path / name).write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    # Reading this as a checkpoint would be an error of its own.
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"no checkpoint")
    before = contents(tmp_path)
    status = main(["infer", str(broken), "--source", str(tmp_path / source), "--output", str(tmp_path / output)])
    assert status == 1
    error = capsys.readouterr().err
    assert "contains the source" in error
    assert error.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_second_run_gets_a_folder_of_its_own(predictor: Predictor, tmp_path: Path) -> None:
    source = image(tmp_path / "in" / "a.png")
    infer(predictor, str(source), tmp_path / "out")
    before = contents(tmp_path / "out")
    infer(predictor, str(source), tmp_path / "out", save_images=False)
    assert contents(tmp_path / "out") == before
    assert sorted(contents(tmp_path / "out2")) == ["predictions.json"]


def test_an_empty_folder_is_used(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    infer(predictor, str(image(tmp_path / "a.png")), tmp_path / "out")
    assert (tmp_path / "out" / "predictions.json").is_file()


@pytest.mark.parametrize("exists", [False, True])
def test_many_claims_at_once_get_a_folder_each(exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "out").mkdir()
    found: list[Path] = []
    together = threading.Barrier(16)

    def claim() -> None:
        with claimed_output(tmp_path / "out") as path:
            found.append(path)
            (path / "result").touch()
            together.wait()

    threads = [threading.Thread(target=claim) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 16
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in found}
    assert all(os.listdir(path) == ["result"] for path in found)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "predictions.json", "images/a.jpg"])
def test_a_folder_with_files_is_left_alone(name: str, predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    before = contents(tmp_path / "out")
    infer(predictor, str(image(tmp_path / "in" / "a.png")), tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert sorted(contents(tmp_path / "out2")) == ["images/a.jpg", "predictions.json"]


@pytest.mark.parametrize("output", ["file", "file/below", "x" * 300, "a\0b"])
def test_an_output_that_cannot_be_a_folder_is_one_error(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DetkitError):
        enter(claimed_output(tmp_path / output))


@pytest.mark.parametrize("content", ['{"images": []}', "[]", "[]x", "names: [a]", '[{"id": 1}]'])
def test_eval_does_not_replace_what_is_no_result(
    content: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "val.json"
    path.write_text(content)
    assert main(["eval", str(checkpoint), "--save-json", str(path)]) == (0 if content == "[]" else 1)
    if content != "[]":
        assert path.read_text() == content
        assert "does not contain detkit results" in capsys.readouterr().err


def names_of(root: Path, *files: str) -> list[str]:
    return list(result_names([root / file for file in files], root).values())


def test_results_are_named_by_their_path_where_the_stem_is_not_unique() -> None:
    root = Path("in")
    assert names_of(root, "shots/a.png", "b.png") == ["a", "b"]
    assert names_of(root, "cam1/frames/0001.png", "cam2/frames/0001.png") == ["cam1/frames/0001", "cam2/frames/0001"]
    assert names_of(root, "a.jpg", "a.png") == ["a.jpg", "a.png"]
    assert names_of(root, "a/b.jpg", "b.jpg", "c/b.png", "c/b.jpg") == ["a/b", "b", "c/b.png", "c/b.jpg"]
    assert names_of(root, "a.b.jpg", "a.c.jpg") == ["a.b", "a.c"]
    assert names_of(root, "caf\udce9.png", "x\x1b[0m.png") == ["caf\\xe9", "x\\x1b[0m"]
    assert names_of(root, "caf\udce9.png", "caf\\xe9.png") == ["caf\\xe9", "caf\\xe9_2"]


def test_ids_are_the_numbers_of_the_files_where_they_are_unique() -> None:
    root = Path("in")
    names = result_names([root / name for name in ("val/000012.jpg", "val/13.jpg", "test/13.jpg", "x.jpg")], root)
    assert list(image_ids(names).values()) == [12, "val/13", "test/13", "x"]


def test_the_folder_that_names_are_relative_to(tmp_path: Path) -> None:
    image(tmp_path / "[ex]" / "a.png")
    assert source_folder(tmp_path) == tmp_path
    assert source_folder(tmp_path / "[ex]" / "a.png") == tmp_path / "[ex]"
    assert source_folder(f"{tmp_path}/*/b/*.png") == tmp_path
    assert source_folder("*.png") == Path()


def test_files_of_folders_with_the_same_names_are_kept_apart(predictor: Predictor, tmp_path: Path) -> None:
    for name in ("cam1/frames/0001.png", "cam2/frames/0001.png"):
        image(tmp_path / "in" / name)
    infer(
        predictor,
        str(tmp_path / "in"),
        tmp_path / "out",
        PredictOptions(conf=0.0, max_det=2, save_txt=True, save_crop=True),
    )
    out = contents(tmp_path / "out")
    for name in ("cam1/frames/0001", "cam2/frames/0001"):
        assert f"images/{name}.jpg" in out
        assert f"labels/{name}.txt" in out
        assert any(path.endswith(f"{name}_1.jpg") and path.startswith("crops/") for path in out)
    ids = {record["image_id"] for record in json.loads(out["predictions.json"])}
    assert ids == {"cam1/frames/0001", "cam2/frames/0001"}


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/etc/x", "..\\up", "a\0b", ".hidden", "CON.", "x" * 400, "%2F"])
def test_a_name_never_leads_elsewhere(name: str, tmp_path: Path) -> None:
    path = tmp_path / safe_name(name)
    path.mkdir()
    assert [item.name for item in tmp_path.iterdir()] == [safe_name(name)]
    assert not path.name.startswith(".")


def test_names_stay_apart() -> None:
    names = ["a/b", "a_b", "a%2Fb", "a b", "a b ", "..", "%2E%2E", "x" * 400, "x" * 401, "ü", "u"]
    assert len({safe_name(name) for name in names}) == len(names)
    assert safe_name("traffic light") == "traffic light"


def test_crops_of_a_class_named_by_dots_stay_in_their_folder(tiny: Any, tmp_path: Path) -> None:
    predictor = Predictor(build_model(tiny(), ClassList.from_names(["..", "a/b", "../../up"])), "cpu")
    infer(
        predictor,
        str(image(tmp_path / "in" / "a.png")),
        tmp_path / "out",
        PredictOptions(conf=0.0, max_det=30, save_crop=True),
    )
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "runs") == ["in", "out", "tiny.yaml"]
    assert {path.name for path in (tmp_path / "out" / "crops").iterdir()} <= {
        "%2E%2E",
        "a%2Fb",
        "%2E./../up",
        "%2E.%2F..%2Fup",
    }


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nb", "", " ", "\ud800", "a\x9b"])
def test_class_names_that_could_reach_the_terminal_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="class name"):
        ClassList.from_names([name])


class TestWriteImage:
    def test_a_long_image_is_not_a_jpeg(self, tmp_path: Path) -> None:
        long = np.zeros((1, 70_000, 3), dtype=np.uint8)
        with pytest.raises(DetkitError, match=r"70000 x 1 pixels cannot be written to '.*' as JPEG: .* Use \.png"):
            write_image(tmp_path / "a.jpg", long)
        assert list(tmp_path.iterdir()) == []
        write_image(tmp_path / "a.png", long)
        with Image.open(tmp_path / "a.png") as written:
            assert written.size == (70_000, 1)

    @pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)])
    def test_infer_writes_it_as_png(self, shape: tuple[int, int], predictor: Predictor, tmp_path: Path) -> None:
        Image.fromarray(np.zeros((*shape, 3), dtype=np.uint8)).save(tmp_path / "long.png")
        infer(predictor, str(tmp_path / "long.png"), tmp_path / "out")
        with Image.open(tmp_path / "out" / "images" / "long.png") as written:
            assert written.size == shape[::-1]

    @pytest.mark.parametrize("name", ["a.xyz", "a", "a.pdf\0"])
    def test_other_formats_are_named(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DetkitError, match="cannot be written"):
            write_image(tmp_path / name, np.zeros((4, 4, 3), dtype=np.uint8))


def test_the_work_goes_on_after_the_reader_of_a_pipe_has_gone(checkpoint: Path, tmp_path: Path) -> None:
    for number in range(5):
        image(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"x")
    command = [sys.executable, "-u", "-m", "detkit", "infer", str(checkpoint), "--source", str(tmp_path / "in")]
    command += ["--output", str(tmp_path / "out"), "--skip-broken", "true", "--conf", "0", "--max-det", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=300)
    assert b"Traceback" not in error, error.decode()
    assert process.returncode == 0
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names that are not UTF-8")
def test_a_name_that_is_not_utf8_is_predicted(checkpoint: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    os.rename(image(tmp_path / "a.png"), os.path.join(folder, b"caf\xe9.png"))
    command = [sys.executable, "-m", "detkit", "infer", str(checkpoint), "--source", str(tmp_path / "in")]
    command += ["--output", str(tmp_path / "out"), "--conf", "0", "--max-det", "1"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())[0]["image_id"] == "caf\\xe9"
    assert (tmp_path / "out" / "images" / "caf\\xe9.jpg").is_file()


def test_control_characters_in_names_reach_no_terminal(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    infer(predictor, str(image(tmp_path / "in\x1b[31m" / "a\x1b]0;x\x07.png")), tmp_path / "out")
    assert "\x1b" not in capsys.readouterr().out
