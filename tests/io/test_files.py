"""Reading and writing files: every damaged file is one error, every file is written whole or not at all."""

import os
import threading
from pathlib import Path

import pytest

from detkit.errors import DataError, WriteError, printable
from detkit.io.files import (
    claim_folder,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
    replacing,
    write_json,
    write_text,
)

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize("text", ["[" * 2000, "{a: " * 2000, "a:\n  - " + "[{b: " * 500, "- " * 3000, "? " * 3000])
def test_yaml_of_great_depth_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="nested too deeply"):
        parse_yaml(text, "file 'x.yaml'")
    depth = 99
    assert parse_yaml("[" * depth + "]" * depth, "file") is not None


class TestReading:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[1, NaN]",
            "[1, -Infinity]",
            "[" * 100_000,
            "9" * 5_000,
            '{"a": "\\ud800"}',
            '["\\uDFFF\\ud800"]',
            "\ufeff\ufeff{}",
        ],
    )
    def test_broken_json_is_one_error(self, text: str) -> None:
        with pytest.raises(DataError, match=r"The file 'x\.json' "):
            parse_json(text, "file 'x.json'")

    def test_a_surrogate_pair_is_a_character(self) -> None:
        assert parse_json('"\\ud83d\\ude00"', "file") == "\N{GRINNING FACE}"

    @pytest.mark.parametrize(
        "text",
        [
            "a: [",
            "a: 1\na: 2",
            "a: !!python/object/apply:os.system [ls]",
            "a: !!int ''",
            "a: 0b_",
            "a: 0x_",
            "? [1]\n: 2",
            "a: &a [*a]",
            "a: &a {<<: *a}",
            BOMB,
            "[" * 100_000,
            '"\\ud800"',
            "a: *missing",
            "a: \x00",
            "--- 1\n--- 2",
            "x" * 10_000_001,
        ],
    )
    def test_broken_yaml_is_one_error(self, text: str) -> None:
        with pytest.raises(DataError, match=r"The file 'x\.yaml' "):
            parse_yaml(text, "file 'x.yaml'")

    def test_long_text_behind_aliases_is_refused(self) -> None:
        text = f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1_000)}]"
        with pytest.raises(DataError, match="once its aliases are expanded"):
            parse_yaml(text, "file")

    def test_yaml_values(self) -> None:
        text = "a: 1e-3\nb: 2020-13-45\nc: yes\nd: &x [1]\ne: *x\nf: 2020-01-02"
        expected = {"a": 1e-3, "b": "2020-13-45", "c": True, "d": [1], "e": [1], "f": "2020-01-02"}
        assert parse_yaml(text, "file") == expected

    def test_scalars_as_text(self) -> None:
        text = "names: [yes, no, 1, 1.50, null, ~, 0x1F, 2020-01-02, 'on']\nnc: 3\nempty:"
        names = ["yes", "no", "1", "1.50", "null", "~", "0x1F", "2020-01-02", "on"]
        assert parse_yaml(text, "file", as_text=True) == {"names": names, "nc": "3", "empty": ""}

    @pytest.mark.parametrize("name", ["missing", "x" * 300, "a\0b", "."])
    def test_a_path_that_cannot_be_read_is_one_error(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError, match="cannot be read"):
            read_json(tmp_path / name, "file")

    def test_other_encodings_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("名".encode("gbk"))
        with pytest.raises(DataError, match=r"is not UTF-8 text \(byte 0 is 0xc3\)"):
            read_text(tmp_path / "a.txt", "file")


class TestWriting:
    def test_a_failure_leaves_the_earlier_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        write_text(path, "before")

        def fail() -> None:
            with replacing(path, "w") as file:
                file.write("after")
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert path.read_text() == "before"
        assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_is_named(self) -> None:
        with pytest.raises(WriteError, match=r"'/dev/full' cannot be written: No space left on device\. Free some"):
            write_text("/dev/full", "x" * 100_000)

    @pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/b"])
    def test_a_path_that_cannot_be_written_is_one_error(self, tmp_path: Path, name: str) -> None:
        write_text(tmp_path / "file", "")
        with pytest.raises(WriteError, match="cannot be written"):
            write_text(tmp_path / name, "")

    def test_a_folder_in_the_place_of_the_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(WriteError, match="Is a directory"):
            write_text(tmp_path, "")

    def test_devices_are_written_to_and_not_replaced(self) -> None:
        write_text("/dev/null", "x")
        assert not Path("/dev/null").is_file()

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "target")
        write_text(tmp_path / "link", "x")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_text() == "x"

    def test_text_that_has_no_encoding_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(WriteError, match="cannot be written as UTF-8"):
            write_text(tmp_path / "a", "\ud800")

    def test_numbers_that_json_does_not_have_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "a.json", [float("nan")])

    def test_the_permissions_are_those_of_a_new_file(self, tmp_path: Path) -> None:
        write_text(tmp_path / "a", "")
        (tmp_path / "b").touch()
        assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "b").st_mode

    def test_every_claim_gets_a_folder_of_its_own(self, tmp_path: Path) -> None:
        found: list[Path] = []
        threads = [threading.Thread(target=lambda: found.append(claim_folder(tmp_path / "run"))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({path.name for path in found}) == 20


def test_control_characters_are_printed_as_escapes() -> None:
    assert printable("a\x1b[31mb\tc\n\ud800") == "a\\x1b[31mb\tc\n\\ud800"


@pytest.mark.parametrize("length", [0, 10, 2000, 2001, 50_000_000])
def test_an_error_never_floods_the_terminal(length: int) -> None:
    message = "x" * length
    assert str(DataError(f"Start. {message} End."))[:6] == "Start."
    assert str(DataError(f"Start. {message} End."))[-4:] == "End."
    assert len(str(DataError(message))) <= 2010
    assert str(DataError(message)) == message or length > 2000
