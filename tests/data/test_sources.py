import os

import pytest

from detkit.data.image import image_size
from detkit.data.sources import CLOSED, DEAD_LINK, HIDDEN, KNOWN_FOLDER, OTHER, SPECIAL, UNREAD, VIDEO, search
from detkit.data.sources import find_images as images_of
from detkit.data.video import is_video
from detkit.errors import DataError, printable


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def below(folder, paths):
    return [path.relative_to(folder).as_posix() for path in paths]


def test_a_file_a_folder_and_a_pattern(tmp_path):
    make(tmp_path, "10.jpg", "2.JPG", "sub dir/ü 1.png", "notes.txt", "._2.jpg")
    assert below(tmp_path, images_of(tmp_path)) == ["2.JPG", "10.jpg", "sub dir/ü 1.png"]
    assert images_of(str(tmp_path / "10.jpg")) == [tmp_path / "10.jpg"]
    assert images_of(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]  # named by the user, so tried
    assert images_of(str(tmp_path / "**" / "*.png")) == [tmp_path / "sub dir" / "ü 1.png"]


def test_everything_that_is_not_read_is_counted_with_its_reason(tmp_path):
    read = ["a.png", "b.avif", "c.jfif", "d.tga", "e.jp2", "f.JPE", "g.pbm", "h.tiff", "i.mpo", "j.apng"]
    make(tmp_path, *read, "video.mp4", "video.MOV", "k.heic", "a.txt", "b.txt", "c.xml", "no_ending", ".DS_Store")
    make(tmp_path, ".cache/x.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    os.mkfifo(tmp_path / "pipe.png")
    found = search(tmp_path)
    assert below(tmp_path, found.images) == read
    assert {reason: sorted(below(tmp_path, paths)) for reason, paths in found.passed_over.items()} == {
        VIDEO: ["video.MOV", "video.mp4"],
        UNREAD: ["k.heic"],
        OTHER: ["a.txt", "b.txt", "c.xml", "no_ending"],
        HIDDEN: [".DS_Store", ".cache"],
        DEAD_LINK: ["gone.png", "self.png"],
        SPECIAL: ["pipe.png"],
    }
    summary = found.summary()
    assert f"{VIDEO}: 2 (.mov, .mp4)" in summary
    assert f"{OTHER}: 4 (.txt, .xml, no_ending)" in summary
    assert f"{DEAD_LINK}: 2 (first: {tmp_path / 'gone.png'})" in summary
    assert "\n" not in summary


def test_links_to_folders_are_visited_once_and_real_paths_win(tmp_path):
    make(tmp_path, "set/1.png", "set/z/2.png", "elsewhere/3.png")
    (tmp_path / "set/a_parent").symlink_to(tmp_path / "set")
    (tmp_path / "set/a_z").symlink_to(tmp_path / "set/z")
    (tmp_path / "set/z/up").symlink_to(tmp_path)
    (tmp_path / "set/other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set")
    found = search(tmp_path / "set")
    assert {path.resolve() for path in found.images} == {
        tmp_path / name for name in ("set/1.png", "set/z/2.png", "elsewhere/3.png")
    }
    assert len(found.images) == 3
    assert below(tmp_path / "set", found.images[:1]) == ["1.png"]
    assert tmp_path / "set/z/2.png" in found.images
    assert {path.name for path in found.passed_over[KNOWN_FOLDER]} >= {"a_parent", "a_z"}


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("pattern", ["", "**/*.png", "**", "**/**/*.png"])
def test_loops_of_links_end(tmp_path, loops, pattern):
    make(tmp_path, "a.png", "sub/b.png")
    for loop in range(loops):
        (tmp_path / f"loop{loop}").symlink_to(tmp_path)
        (tmp_path / "sub" / f"loop{loop}").symlink_to(tmp_path / "sub")
    assert below(tmp_path, images_of(tmp_path / pattern)) == ["a.png", "sub/b.png"]


def test_a_folder_by_a_link_is_searched(tmp_path):
    make(tmp_path, "real/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert images_of(tmp_path / "link") == [tmp_path / "link/a.png"]


@pytest.mark.parametrize("name", ["[ex]", "a*b", "what?", "[", "***"])
def test_a_folder_or_file_named_like_a_pattern_is_meant_literally(tmp_path, name):
    make(tmp_path, f"{name}/1.png", f"{name}/in/2.png", "e/3.png", "axb/4.png", "what!/5.png")
    assert below(tmp_path, images_of(tmp_path / name / "*.png")) == [f"{name}/1.png"]
    assert below(tmp_path, images_of(tmp_path / name)) == [f"{name}/1.png", f"{name}/in/2.png"]
    assert below(tmp_path, images_of(tmp_path / name / "**" / "*.png")) == [f"{name}/1.png", f"{name}/in/2.png"]
    make(tmp_path, f"{name}.png")
    assert images_of(tmp_path / f"{name}.png") == [tmp_path / f"{name}.png"]


def test_patterns_are_those_of_glob(tmp_path, monkeypatch):
    make(tmp_path, "a/1.png", "b/2.png", "b/c/3.png", "b/.h/4.png", ".h/5.png", "6.png", "7.txt", "b/.8.png")
    for pattern, expected in {
        "[ab]/*.png": ["a/1.png", "b/2.png"],
        "[!a]/*": ["b/2.png"],
        "*": ["6.png"],
        "?/c/*.png": ["b/c/3.png"],
        "b/**": ["b/2.png", "b/c/3.png"],
        "**/c/*": ["b/c/3.png"],
        "**/**": ["6.png", "a/1.png", "b/2.png", "b/c/3.png"],
        ".h/*.png": [".h/5.png"],
        ".*/*.png": [".h/5.png"],
        "b/../a/*.png": ["b/../a/1.png"],
    }.items():
        assert below(tmp_path, images_of(tmp_path / pattern)) == expected, pattern
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in images_of("[ab]/*.png")] == ["a/1.png", "b/2.png"]
    assert [str(path) for path in images_of(".")] == ["6.png", "a/1.png", "b/2.png", "b/c/3.png"]
    found = search("*")
    assert [str(path) for path in found.passed_over[OTHER]] == ["7.txt"]


def test_nothing_found_says_what_there_is(tmp_path):
    with pytest.raises(DataError, match=r"The folder '.*' contains no images\. .*\.jpeg"):
        images_of(tmp_path)
    with pytest.raises(DataError, match=r"no image that matches the pattern, '.*\*\.png'"):
        images_of(str(tmp_path / "*.png"))
    make(tmp_path, "a.mp4", "b.heic")
    with pytest.raises(DataError, match=r"contains no images \(skipped: .*videos.*: 1 \(\.mp4\).*1 \(\.heic\)"):
        images_of(tmp_path)


@pytest.mark.parametrize("source", ["a\0b.png", "x" * 300 + ".png", "x/" * 3000, "[" * 50, "**\0*"])
def test_impossible_sources_are_errors(tmp_path, source):
    with pytest.raises(DataError):
        images_of(f"{tmp_path}/{source}")
    with pytest.raises(DataError):
        image_size(f"{tmp_path}/{source}")


def test_a_dangling_link_as_the_source_is_named(tmp_path):
    (tmp_path / "a.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"broken links: 1 \(first: .*a\.png\)"):
        images_of(tmp_path / "a.png")


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff.png")
    make(tmp_path, name, os.fsdecode(b"\xfe.txt"), "a.png")
    (tmp_path / os.fsdecode(b"\xf1.png")).symlink_to("nowhere")
    found = search(tmp_path)
    assert [path.name for path in found.images] == ["a.png", name]
    printable(found.summary()).encode()
    assert images_of(tmp_path / "caf*") == [tmp_path / name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
def test_a_folder_without_permission_is_named(tmp_path):
    make(tmp_path, "a.png", "shut/b.png")
    (tmp_path / "shut").chmod(0)
    try:
        assert search(tmp_path).passed_over[CLOSED] == [tmp_path / "shut"]
    finally:
        (tmp_path / "shut").chmod(0o700)


def test_a_folder_named_like_a_video_is_a_folder(tmp_path):
    make(tmp_path, "clip.mp4/1.png", "clip.mov")
    assert not is_video(tmp_path / "clip.mp4")
    assert is_video(tmp_path / "clip.mov")
    assert below(tmp_path, images_of(tmp_path)) == ["clip.mp4/1.png"]
    assert images_of(tmp_path / "clip.mp4") == [tmp_path / "clip.mp4/1.png"]
