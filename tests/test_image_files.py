"""Image files in folders and archives: where they are found; what is missing or outside is named."""

import os
import tracemalloc
import zipfile

import pytest
from PIL import Image

from cocoa import image_files
from cocoa.errors import CocoaError
from cocoa.image_files import check_image_files, image_locator
from cocoa.images import image_size, inspect_image, load_image, read_image_bytes


def archive(path, **members):
    """A zip of pictures of a colour each, by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, colour in members.items():
            picture = path.parent / "picture.png"
            Image.new("RGB", (6, 4), colour).save(picture)
            file.write(picture, name)
            picture.unlink()
    return path


def test_a_member_of_an_archive_is_read_like_a_file(tmp_path):
    inside = str(archive(tmp_path / "images.zip", **{"A-OKVQA/0.png": "red", "A-OKVQA/1.png": "blue"}))
    assert load_image(f"{inside}/A-OKVQA/1.png").getpixel((0, 0)) == (0, 0, 255)
    assert image_size(f"{inside}/A-OKVQA/0.png") == (6, 4)
    assert read_image_bytes(f"{inside}/A-OKVQA/0.png").startswith(b"\x89PNG")
    check_image_files([(f"{inside}/A-OKVQA/0.png", "A-OKVQA", 0)], {"A-OKVQA": str(tmp_path)})
    with pytest.raises(CocoaError, match=r"2\.png: no such image file \(data set A-OKVQA, row 7\)"):
        check_image_files([(f"{inside}/A-OKVQA/2.png", "A-OKVQA", 7)])
    with pytest.raises(CocoaError, match=r"2\.png: no such image file"):
        load_image(f"{inside}/A-OKVQA/2.png")
    with pytest.raises(CocoaError, match=r"2\.png: cannot be read"):
        read_image_bytes(f"{inside}/A-OKVQA/2.png")


def test_a_folder_may_be_named_like_an_archive(tmp_path):
    (tmp_path / "old.zip").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "old.zip" / "0.png")
    path = str(tmp_path / "old.zip" / "0.png")
    assert load_image(path).size == (3, 3)
    check_image_files([(path, "x", 0)], {"x": str(tmp_path)})


def test_a_broken_archive_is_named(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK, but no archive")
    with pytest.raises(CocoaError, match=r"images\.zip: not a readable archive"):
        image_locator(tmp_path)("A-OKVQA/0.png")


@pytest.mark.parametrize(
    ("files", "path", "expected"),
    [
        (["images/A/Train/0.png"], "images/A/Train/0.png", "images/A/Train/0.png"),  # MMEB-train, unpacked
        (["images_zip/A.zip/A/Train/0.png"], "images/A/Train/0.png", "images_zip/A.zip/A/Train/0.png"),  # as it comes
        (["A/0.png"], "A/0.png", "A/0.png"),  # MMEB-eval, unpacked in three places
        (["images/A/0.png"], "A/0.png", "images/A/0.png"),
        (["eval_images/A/0.png"], "A/0.png", "eval_images/A/0.png"),
        (["images.zip/A/0.png"], "A/0.png", "images.zip/A/0.png"),  # and as it comes
        (["images.zip/images/A/0.png"], "A/0.png", "images.zip/images/A/0.png"),
        (["images/A/0.png", "images.zip/A/0.png"], "A/0.png", "images/A/0.png"),  # a file before an archive
        ([], "A/0.png", "A/0.png"),
    ],
)
def test_images_are_found_where_downloads_put_them(tmp_path, files, path, expected):
    for file in files:
        head, packed, member = file.partition(".zip/")
        if packed:
            archive(tmp_path / f"{head}.zip", **{member: "red"})
        else:
            (tmp_path / file).parent.mkdir(parents=True)
            Image.new("RGB", (3, 3)).save(tmp_path / file)
    assert image_locator(tmp_path)(path) == str(tmp_path / expected)


def test_a_data_set_may_have_its_images_in_several_places(tmp_path):
    """Each folder of them is looked for; a missing first file does not hide where the others are."""
    archive(tmp_path / "images_zip" / "A.zip", **{"A/Train/1.png": "red"})
    archive(tmp_path / "images_zip" / "B.zip", **{"B/Train/0.png": "red"})
    locate = image_locator(tmp_path)
    paths = ["images/A/Train/0.png", "images/B/Train/0.png", "images/A/Train/1.png"]
    archives = tmp_path / "images_zip"
    assert [locate(path) for path in paths] == [
        str(tmp_path / "images/A/Train/0.png"),
        str(archives / "B.zip/B/Train/0.png"),
        str(archives / "A.zip/A/Train/1.png"),
    ]


@pytest.mark.parametrize(
    "path", ["../secret.png", "A/../../secret.png", "{outside}", "A/link.png", "linked/secret.png"]
)
def test_no_path_leaves_the_data_folder(tmp_path, path):
    """A path with `..`, an absolute one, and links out of it: all of a file that is there."""
    Image.new("RGB", (3, 3)).save(tmp_path / "secret.png")
    data = tmp_path / "data"
    (data / "A").mkdir(parents=True)
    (data / "A" / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "linked").symlink_to(tmp_path)
    path = path.replace("{outside}", str(tmp_path / "secret.png"))
    found = image_locator(data)(path)
    with pytest.raises(CocoaError, match=r"(outside of the data folder|no such image file).*data set A, row 3"):
        check_image_files([(found, "A", 3)], {"A": str(data)})


def test_a_link_into_the_blobs_of_its_own_hub_cache_is_a_download(tmp_path):
    repo = tmp_path / "datasets--TIGER-Lab--MMEB-eval"
    snapshot, other = repo / "snapshots" / "abc", tmp_path / "datasets--other" / "blobs"
    for folder in (snapshot / "A", repo / "blobs", other):
        folder.mkdir(parents=True)
    for blob, name in ((repo / "blobs" / "1234", "0.png"), (other / "5678", "1.png")):
        Image.new("RGB", (3, 3)).save(blob, "PNG")
        (snapshot / "A" / name).symlink_to(os.path.relpath(blob, snapshot / "A"))
    locate = image_locator(snapshot)
    check_image_files([(locate("A/0.png"), "A", 0)], {"A": str(snapshot)})
    assert load_image(locate("A/0.png")).size == (3, 3)
    with pytest.raises(CocoaError, match="outside of the data folder"):
        check_image_files([(locate("A/1.png"), "A", 1)], {"A": str(snapshot)})


def test_a_linked_data_folder_is_as_good_as_its_target(tmp_path):
    (tmp_path / "real" / "A").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(tmp_path / "real" / "A" / "0.png")
    (tmp_path / "data").symlink_to(tmp_path / "real")
    check_image_files([(image_locator(tmp_path / "data")("A/0.png"), "A", 0)], {"A": str(tmp_path / "data")})


def test_a_damaged_archive_is_no_traceback(tmp_path):
    path = archive(tmp_path / "images.zip", **{"A/0.png": "red"})
    content = bytearray(path.read_bytes())
    start = content.index(b"A/0.png") + len(b"A/0.png")
    content[start : start + 20] = bytes(20)  # the member's own bytes
    path.write_bytes(content)
    assert inspect_image(f"{path}/A/0.png").fault.startswith(("cannot be read", "not a"))
    with pytest.raises(CocoaError, match=r"0\.png"):
        load_image(f"{path}/A/0.png")


def test_a_broken_archive_does_not_hide_what_is_elsewhere(tmp_path):
    (tmp_path / "images_zip").mkdir()
    (tmp_path / "images_zip" / "A.zip").write_bytes(b"PK, but no archive")
    archive(tmp_path / "images_zip" / "B.zip", **{"B/0.png": "red"})
    locate = image_locator(tmp_path)
    assert locate("B/0.png") == str(tmp_path / "images_zip" / "B.zip" / "B" / "0.png")
    with pytest.raises(CocoaError, match=r"A\.zip: not a readable archive"):
        locate("A/0.png")


@pytest.mark.parametrize("path", ["A\0B/0.png", f"{'x' * 300}/0.png", f"A/{'x' * 300}.png"])
def test_paths_that_no_file_system_takes_are_missing(tmp_path, path):
    found = image_locator(tmp_path)(path)
    with pytest.raises(CocoaError, match=r"no such image file \(data set A, row 3\)"):
        check_image_files([(found, "A", 3)], {"A": str(tmp_path)})


def packed(folder, content, way=zipfile.ZIP_DEFLATED):
    """The path of a member with that content."""
    with zipfile.ZipFile(folder / "images.zip", "w", way) as file:
        file.writestr("A/0.png", content)
    return folder / "images.zip", f"{folder}/images.zip/A/0.png"


def test_a_member_that_unpacks_to_more_than_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_IMAGE_BYTES", 1000)
    _, member = packed(tmp_path, bytes(1001))
    with pytest.raises(CocoaError, match=r"0\.png: not a readable image \(1001 bytes are more than 1000; scale"):
        load_image(member)
    assert "1001 bytes" in inspect_image(member).fault and image_size(member) == (0, 0)
    (tmp_path / "0.png").write_bytes(bytes(1001))
    with pytest.raises(CocoaError, match="1001 bytes are more than 1000"):
        load_image(str(tmp_path / "0.png"))


def test_a_member_that_holds_more_than_it_says_is_not_unpacked(tmp_path):
    path, member = packed(tmp_path, bytes(300_000_000))
    size = (300_000_000).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (1000).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(CocoaError, match=r"0\.png: cannot be read \(Bad CRC-32"):
        read_image_bytes(member)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10_000_000


def test_ways_of_packing_that_unpack_everything_at_once_are_refused(tmp_path):
    _, member = packed(tmp_path, bytes(1000), zipfile.ZIP_LZMA)
    with pytest.raises(CocoaError, match=r"0\.png: not a readable image \(neither stored nor deflated"):
        load_image(member)


def test_an_archive_of_another_version_is_no_traceback(tmp_path):
    path, _ = packed(tmp_path, b"")
    path.write_bytes(path.read_bytes().replace(b"PK\1\2\x14\3\x14", b"PK\1\2\x14\3\xff"))
    with pytest.raises(CocoaError, match=r"images\.zip: not a readable archive \(zip file version 25\.5\)"):
        image_locator(tmp_path)("A/0.png")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(CocoaError, match=r"0\.png: not a readable image \(a folder, pipe or device\)"):
        load_image(str(tmp_path / "0.png"))
    assert "a folder, pipe or device" in inspect_image(str(tmp_path / "0.png")).fault
