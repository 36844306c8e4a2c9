"""Classification data in folders, and crops of detection data: all images counted, classes alike in all splits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.data.check import check
from detkit.data.dataset import Dataset, Problems
from detkit.data.formats.crops import Crops
from detkit.data.formats.folder import Folder
from detkit.data.splits import open_train_and_val
from detkit.data.transforms import Augment, Fit
from detkit.errors import ConfigError, DataError
from detkit.registry import augmentations, datasets
from detkit.structures import ClassList, Meta, Sample, Target


def image(path: Path, value: int = 99) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), value, dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("train/cat/1.jpg", "train/cat/deep/er/2.PNG", "train/dog/1.jpg", "val/cat/1.jpg", "val/owl/x.jpg"):
        image(tmp_path / name)
    return tmp_path


class TestFolder:
    def test_classes_are_those_of_all_splits(self, root: Path) -> None:
        train, val = open_train_and_val({"name": "folder", "root": str(root)}, frozenset({"image_labels"}))
        assert train.classes.names == val.classes.names == ("cat", "dog", "owl")
        found = [(train.image_id(i), train.target(i).image_labels.tolist()) for i in range(len(train))]  # type: ignore[union-attr]
        assert found == [("cat/1.jpg", [0]), ("cat/deep/er/2.PNG", [0]), ("dog/1.jpg", [1])]
        sample = val[1]
        assert sample.target.image_labels.tolist() == [2]  # type: ignore[union-attr]
        assert len(sample.target) == 0
        assert sample.meta.size == (20, 30)

    def test_what_is_no_image_and_classes_without_any_are_counted(self, root: Path) -> None:
        for name in ("train/cat/notes.txt", "train/list.csv", "train/cat/.hidden.jpg"):
            (root / name).write_bytes(b"x")
        data = Folder(str(root), "train")
        kinds = sorted((problem.kind, Path(problem.where).name) for problem in data.problems.found)
        assert kinds == [
            ("class without images", "owl"),
            ("file that is not an image", ".hidden.jpg"),
            ("file that is not an image", "notes.txt"),
            ("file without a class", "list.csv"),
        ]
        assert len(data) == 3

    def test_broken_images_follow_the_policy(self, root: Path) -> None:
        (root / "train" / "dog" / "cut.jpg").write_bytes((root / "train" / "dog" / "1.jpg").read_bytes()[:200])
        with pytest.raises(DataError, match=r"1 x unreadable image.*cut\.jpg"):
            Folder(str(root), "train")
        data = Folder(str(root), "train", broken="skip")
        assert [data.image_id(index) for index in range(len(data))][-1] == "dog/1.jpg"
        assert "1 x unreadable image: left out the image" in data.problems.summary()

    def test_given_classes_are_the_only_ones(self, root: Path) -> None:
        names = ("dog", "cat")
        assert Folder(str(root), "train", class_names=names).target(0).image_labels.tolist() == [1]  # type: ignore[union-attr]
        with pytest.raises(DataError, match=r"1 x unknown class.*'owl' is not in the list"):
            Folder(str(root), "val", class_names=names)
        assert len(Folder(str(root), "val", "skip", names)) == 1

    def test_splits_and_folders_that_are_not_there(self, root: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"There is no split 'tain'.*Did you mean 'train'"):
            Folder(str(root), "tain")
        with pytest.raises(DataError, match=r"no folder.*train/cat/1\.jpg|does not exist"):
            Folder(str(root / "nowhere"), "train")
        image(tmp_path / "flat" / "train" / "1.jpg")
        with pytest.raises(DataError, match="has no folders"):
            Folder(str(tmp_path / "flat"), "train")

    def test_links_to_folders_within_a_class_are_counted(self, root: Path) -> None:
        before = len(datasets.build({"name": "folder", "root": str(root)}, "data", split="train"))
        (root / "train/cat/loop").symlink_to(root / "train")
        data = datasets.build({"name": "folder", "root": str(root)}, "data", split="train")
        assert len(data) == before
        assert "1 x link to a folder: skipped" in data.problems.summary()

    def test_check_counts_images_by_class(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert check({"name": "folder", "root": str(root)}) == 0  # that each split lacks a class is harmless
        output = capsys.readouterr().out
        assert "train (train): 3 images" in output
        assert "class without images" in output


@datasets.register("two_boxes_for_crops")
class TwoBoxes(Dataset):
    """One image whose red value is its column, green its row."""

    def __init__(self, split: str) -> None:
        self.classes = ClassList.from_names(["a", "b"])
        self.fields = frozenset({"boxes", "labels"})
        self.problems = Problems("two boxes", "fail")
        self.read = 0

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        self.read += 1
        rows, columns = np.mgrid[:50, :80].astype(np.uint8)
        return Sample(np.stack([columns, rows, rows], -1), self.target(index), Meta("id", "file", (50, 80)))

    def target(self, index: int) -> Target:
        boxes = torch.tensor([[10.0, 20, 30, 40], [60, 0, 80, 30], [0, 0, 5, 5], [5.4, 5.4, 5.6, 5.6]])
        crowd = torch.tensor([False, False, True, False])
        return Target(boxes, torch.tensor([0, 1, 1, 1]), crowd=crowd)

    def size(self, index: int) -> tuple[int, int]:
        return 50, 80


class TestCrops:
    def test_each_object_is_an_image(self) -> None:
        data = Crops("train", {"name": "two_boxes_for_crops"}, margin=0.1)
        assert len(data) == 3
        first, second, small = (data[index] for index in range(3))
        # 10 % of 20 pixels on each side; cut off at the right and upper edge of the image
        assert first.image[0, 0].tolist() == [8, 18, 18]
        assert first.image.shape == (24, 24, 3)
        assert second.image[0, 0].tolist() == [58, 0, 0]
        assert second.image.shape == (33, 22, 3)
        assert small.image.shape == (1, 1, 3)
        assert [sample.target.image_labels.tolist() for sample in (first, second, small)] == [[0], [1], [1]]  # type: ignore[union-attr]
        assert [sample.size for sample in (first, second)] == [data.size(0), data.size(1)]
        assert first.meta.image_id == data.image_id(0) == "id#0"

    def test_crowds_are_left_out_and_counted(self) -> None:
        data = Crops("train", {"name": "two_boxes_for_crops"})
        assert "1 x crowd: not cropped (first: image id, object 2" in data.problems.summary()

    def test_neighbours_share_one_reading(self) -> None:
        data = Crops("train", {"name": "two_boxes_for_crops"})
        for index in range(3):
            data[index]
        assert data.dataset.read == 2  # one for the id in the report  # type: ignore[attr-defined]

    def test_mistakes(self, root: Path) -> None:
        with pytest.raises(ConfigError, match=r"data\.margin"):
            Crops("train", {"name": "two_boxes_for_crops"}, margin=-1)
        with pytest.raises(DataError, match="no boxes to crop"):
            Crops("train", {"name": "folder", "root": str(root)})
        with pytest.raises(ConfigError, match=r"data\.data\.rot"):
            Crops("train", {"name": "folder", "rot": str(root)})


def test_detection_data_know_the_classes_of_an_image() -> None:
    data = datasets.build({"name": "shapes", "train_count": 20}, "data", split="train")
    assert "image_labels" in data.fields
    for index in range(20):
        target = data.target(index)
        assert target.image_labels.tolist() == sorted(set(target.labels.tolist()))


def test_classes_of_an_image_pass_through_fit_and_augment() -> None:
    data = datasets.build({"name": "shapes", "train_count": 4}, "data", split="train")
    fit = Fit((32, 32))
    augment = Augment([{"name": "random_resized_crop"}, {"name": "flip"}], fit)
    for index in range(4):
        labels = data.target(index).image_labels
        assert torch.equal(fit(data[index]).target.image_labels, labels)
        assert torch.equal(augment(data[index], seed=index).target.image_labels, labels)


class TestRandomResizedCrop:
    def windows(self, size: tuple[int, int], count: int = 400, **options: Any) -> np.ndarray:
        """(count, 2) rows and columns of windows."""
        import random

        crop = augmentations.build({"name": "random_resized_crop", **options}, "augment[0]")
        crop.set_random_state(np.random.default_rng(0), random.Random(0))
        found = [crop.get_params_dependent_on_data({"shape": (*size, 3)}, {})["crop_coords"] for _ in range(count)]
        for left, top, right, bottom in found:
            assert 0 <= left < right <= size[1]
            assert 0 <= top < bottom <= size[0]
        return np.array([[bottom - top, right - left] for left, top, right, bottom in found])

    def test_area_and_ratio_lie_in_their_ranges_and_reach_the_ends(self) -> None:
        windows = self.windows((400, 400), area=[0.1, 0.5], ratio=[0.5, 2.0])
        areas, ratios = windows.prod(1) / 160_000, windows[:, 1] / windows[:, 0]
        assert 0.098 < areas.min() < 0.12
        assert 0.48 < areas.max() < 0.51
        assert 0.49 < ratios.min() < 0.55
        assert 1.8 < ratios.max() < 2.03
        # as often wider than high as the other way
        assert abs((ratios > 1).mean() - 0.5) < 0.1

    def test_a_window_that_does_not_fit_is_the_whole_image(self) -> None:
        assert (self.windows((10, 500), count=5, area=[0.9, 1.0], ratio=[1.0, 1.0]) == [10, 500]).all()

    @pytest.mark.parametrize("options", [{"area": [0, 1]}, {"area": [0.1, 1.5]}, {"ratio": [2.0, 0.5]}])
    def test_impossible_ranges(self, options: dict) -> None:
        with pytest.raises(ConfigError, match="random_resized_crop"):
            augmentations.build({"name": "random_resized_crop", **options}, "augment[0]")
