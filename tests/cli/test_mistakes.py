"""Mistakes of the user: one paragraph each."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_runs import Run, fails
from PIL import Image

from detkit.config import load_experiment
from detkit.model import build_model
from detkit.structures import ClassList


def voc(root: Path, box: tuple[int, int, int, int] = (2, 3, 30, 40), name: str = "cell") -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for index, split in enumerate(("train", "val")):
        stem = f"p{index}"
        Image.fromarray(np.full((60, 80, 3), 99, dtype=np.uint8)).save(root / "JPEGImages" / f"{stem}.jpg")
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
        (root / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><size><width>80</width><height>60</height></size>\n"
            f"<object><name>{name}</name>\n<bndbox>{corners}</bndbox></object>\n</annotation>"
        )
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{stem}\n")
    return root


class TestBadInput:
    def test_commands_and_options(self, run: Run, tiny_config: Path, checkpoint: Path) -> None:
        fails(run("trian"), "Did you mean 'train'")
        fails(run("train"), "needs a config")
        fails(run("train", "missing.yaml"), "missing.yaml")
        fails(run("train", tiny_config, "--train.epoch", "3"), "'train.epoch'", "Did you mean 'epochs'")
        fails(run("train", tiny_config, "--train.epochs", "few"), "train.epochs", "few")
        fails(run("train", tiny_config, "--head.nams", "3"), "'head.nams' is not an option")
        fails(run("infer", checkpoint, "--soruce", "x"), "'--soruce'", "Did you mean 'source'")
        fails(run("infer", checkpoint), "source")
        fails(run("infer", checkpoint, "--source", "x", "--conf", "abc"), "conf", "abc")
        fails(run("eval"), "needs a run folder")
        fails(run("eval", checkpoint, "--head.nms_threshold", "0.3"), "'--head.nms_threshold' cannot be changed")
        fails(run("train", tiny_config, "--resume", ""), "--resume needs a run folder")
        fails(run("infer", checkpoint, "--source", tiny_config.parent), "no images")

    def test_a_misspelt_key_in_a_config(self, run: Run, tiny_config: Path) -> None:
        tiny_config.write_text(tiny_config.read_text().replace("warmup_epochs", "warm_up_epochs"))
        fails(run("train", tiny_config), "'train.warm_up_epochs'", str(tiny_config), "Did you mean 'warmup_epochs'")

    def test_missing_folders_and_images(self, run: Run, tiny_config: Path, checkpoint: Path, tmp_path: Path) -> None:
        data = ("--data", '{name: voc, root: "' + str(tmp_path / "nowhere") + '"}')
        fails(run("train", tiny_config, *data), str(tmp_path / "nowhere"))
        fails(run("infer", checkpoint, "--source", tmp_path / "nowhere"), str(tmp_path / "nowhere"))
        (tmp_path / "void").mkdir()
        fails(run("infer", checkpoint, "--source", tmp_path / "void"), str(tmp_path / "void"))

    def test_broken_annotations(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        root = voc(tmp_path / "voc", box=(30, 3, 2, 40))
        data = ("--data", f'{{name: voc, root: "{root}"}}')
        fails(run("train", tiny_config, *data), "p0.xml", "repair", "skip")
        fails(run("check", tiny_config, "--data", f'{{name: voc, root: "{root}x"}}'), "vocx")
        status, output, error = run("check", tiny_config, *data)
        assert status == 1
        assert "p0.xml" in output
        assert "p1.xml" in output
        fails((status, output, error), "2 problems")

    def test_a_class_that_is_not_in_the_list(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        root = voc(tmp_path / "voc", name="cel")
        data = ("--data", f'{{name: voc, root: "{root}", class_names: [cell, other]}}')
        fails(run("train", tiny_config, *data), "'cel'", "p0.xml", "cell")

    def test_an_absent_image_and_malformed_xml(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        root = voc(tmp_path / "voc")
        data = ("--data", f'{{name: voc, root: "{root}"}}')
        (root / "JPEGImages" / "p1.jpg").unlink()
        fails(run("train", tiny_config, *data), "p1")
        (root / "Annotations" / "p0.xml").write_text("<annotation>\n<object>\n</annotation>")
        fails(run("train", tiny_config, *data), "p0.xml:3")

    def test_truncated_and_empty_images(self, run: Run, tiny_config: Path, checkpoint: Path, tmp_path: Path) -> None:
        root = voc(tmp_path / "voc")
        data = ("--data", f'{{name: voc, root: "{root}"}}')
        path = root / "JPEGImages" / "p0.jpg"
        path.write_bytes(path.read_bytes()[:400])
        fails(run("train", tiny_config, *data), "p0.jpg")
        fails(run("infer", checkpoint, "--source", path), "p0.jpg", "--skip-broken")
        (root / "JPEGImages" / "a.jpg").write_bytes((root / "JPEGImages" / "p1.jpg").read_bytes())
        for batch in (1, 8):
            stopped = tmp_path / f"stopped{batch}"
            given = ("--source", root / "JPEGImages", "--output", stopped, "--conf", "0", "--batch", batch)
            fails(run("infer", checkpoint, *given), str(stopped))
            assert {record["image_id"] for record in json.loads((stopped / "predictions.json").read_text())} == {"a"}
        (root / "JPEGImages" / "a.jpg").unlink()
        (root / "JPEGImages" / "empty.jpg").write_bytes(b"")
        status, output, _ = run(
            *("infer", checkpoint, "--source", root / "JPEGImages", "--output", tmp_path / "out", "--skip-broken")
        )
        assert status == 0
        assert "1 image," in output
        assert "2 skipped" in output
        assert "p0.jpg" in output
        assert "empty.jpg" in output

    def test_malformed_json(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        (tmp_path / "coco" / "annotations").mkdir(parents=True)
        (tmp_path / "coco" / "train").mkdir()
        (tmp_path / "coco" / "annotations" / "instances_train.json").write_text('{"images": [\n')
        data = ("--data", f'{{name: coco, root: "{tmp_path / "coco"}"}}')
        fails(run("train", tiny_config, *data), "instances_train.json", "line 2")

    def test_a_checkpoint_of_another_class_list(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        path = tmp_path / "other.safetensors"
        names = ClassList.from_names(["circle", "rhombus"])
        build_model(load_experiment([str(tiny_config)]), names).save(path)
        fails(run("eval", path), "other.safetensors", "rhombus", "square", "weights_parts")
        fails(run("train", tiny_config, "--weights", path), "rhombus", "weights_parts")
        status, _, error = run(
            *("train", tiny_config, "--weights", path, "--weights_parts", "[backbone]", "--train.epochs", "1")
        )
        assert status == 0, error

    def test_boxes_outside_are_repaired_and_counted(self, run: Run, tiny_config: Path, tmp_path: Path) -> None:
        root = voc(tmp_path / "voc", box=(10, 10, 300, 40))
        data = ("--data", f'{{name: voc, root: "{root}", broken: repair}}', "--train.epochs", "1")
        status, output, error = run("train", tiny_config, *data)
        assert status == 0, error
        assert "1 problem (broken: repair)" in output


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, f"{'deep/' * 900}x", "~nobody/x", "\udce4"])
def test_paths_that_cannot_be(run: Run, tiny_config: Path, checkpoint: Path, path: str) -> None:
    fails(run("train", f"{path}.yaml"))
    fails(run("check", tiny_config, "--data", "{name: voc}", "--data.root", path))
    fails(run("eval", path))
    fails(run("infer", path, "--source", checkpoint))
    fails(run("infer", checkpoint, "--source", path))
    tiny_config.write_text(json.dumps({"data": {"name": "voc", "root": path}}))
    fails(run("check", tiny_config))


def test_folders_without_one_above_them_are_no_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("/", ".", ""):
        fails(run("eval", folder))
