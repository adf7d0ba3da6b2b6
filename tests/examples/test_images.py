from __future__ import annotations

import io
import json
import logging
import pickle
import random
import tarfile
from pathlib import Path

import numpy
import pytest
import torch

for module in ("PIL", "torchvision", "sklearn"):
    pytest.importorskip(module)

from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import transforms  # noqa: E402

from examples.data import digits, tars  # noqa: E402
from examples.data.images import Images, open_images  # noqa: E402

Members = list[tuple[str, bytes]]
AUGMENT = transforms.Compose(
    [transforms.RandomCrop(6), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)


def picture(value: int, kind: str = "PNG", size: int = 8) -> bytes:
    data = io.BytesIO()
    Image.fromarray(
        numpy.random.RandomState(value).randint(0, 255, (size, size, 3), dtype=numpy.uint8)
    ).save(data, kind)
    return data.getvalue()


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, first: int = 0) -> Members:
    return [
        member
        for i in range(first, first + count)
        for member in ((f"{i:03}.png", picture(i)), (f"{i:03}.cls", str(i % 10).encode()))
    ]


def write_folder(root: Path, count: int) -> Path:
    for i in range(count):
        (root / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        (root / f"class{i % 3}" / f"{i:03}.png").write_bytes(picture(i))
    return root


@pytest.fixture(params=["tar", "folder"])
def images(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with 30 images in its split train."""
    if request.param == "folder":
        write_folder(tmp_path / "train", 30)
    else:
        write_tar(tmp_path / "train" / "a.tar", samples(7))
        write_tar(tmp_path / "train" / "b.tar", samples(23, first=7))
    return tmp_path


def test_digits_are_the_same_in_folders_and_tars_and_split_as_in_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("folder", "tar"):
        assert digits.main(["--out", str(tmp_path / kind), "--format", kind, "--size", "8"]) == 0
    assert f"{tmp_path / 'tar' / 'valid'}: 449 images of 8 × 8, tar" in capsys.readouterr().out
    assert digits.main(["--out", str(tmp_path / "tar")]) == 2
    assert "--out takes a folder without train, got " in capsys.readouterr().err
    from examples.compare.vit import digits as compared

    for split, (pixels, labels) in zip(("train", "valid"), compared(), strict=True):
        both = [
            open_images(tmp_path / kind, split, transforms.ToTensor(), seed=1)
            for kind in ("folder", "tar")
        ]
        assert [each.num_classes for each in both] == [10, 10] and len(both[0]) == len(
            both[1]
        ) == len(labels)
        folder, tar = ([each[i] for i in range(len(each))] for each in both)
        assert (
            sorted(label for _, label in folder)
            == sorted(label for _, label in tar)
            == sorted(labels.tolist())
        )
        source = both[1].source  # the tars keep the split's order
        assert [source.label(item) for item in range(len(source))] == labels.tolist()
        grey = transforms.ToTensor()(Image.open(io.BytesIO(source.read(0))))[0]
        assert torch.corrcoef(torch.stack([grey.flatten(), pixels[0].flatten()]))[0, 1] > 0.999


def test_a_sample_depends_on_its_number_and_the_seed_alone(images: Path) -> None:
    def opened(seed: int = 0) -> Images:
        return open_images(images, "train", AUGMENT, seed)

    train = opened()
    order = [train[i] for i in range(90)]
    assert sorted(label for _, label in order[:30]) == sorted(label for _, label in order[30:60])
    assert [label for _, label in order[:30]] != [label for _, label in order[30:60]]
    again = opened()
    for i in (77, 3, 50, 3):
        assert torch.equal(again[i][0], order[i][0]) and again[i][1] == order[i][1]
    assert any(not torch.equal(opened(seed=1)[i][0], order[i][0]) for i in range(5))
    with pytest.raises(IndexError):
        train[-1]


def test_workers_read_the_same_samples(images: Path) -> None:
    train = open_images(images, "train", AUGMENT, 5)
    loader = DataLoader(train, 6, sampler=range(18, 48), num_workers=2)
    pixels, labels = (torch.cat(list(each)) for each in zip(*loader, strict=True))
    assert torch.equal(pixels, torch.stack([train[i][0] for i in range(18, 48)]))
    assert labels.tolist() == [train[i][1] for i in range(18, 48)]
    spawned = pickle.loads(pickle.dumps(train))  # how spawned workers get it
    assert torch.equal(spawned[20][0], train[20][0])


def test_transforms_draw_apart_from_the_run(images: Path) -> None:
    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), numpy.random.rand(), random.random()

    def seed() -> None:
        torch.manual_seed(0), numpy.random.seed(0), random.seed(0)

    train = open_images(images, "train", lambda image: draws())
    seed()
    expected = draws()
    seed()
    first, second = train[0][0], train[1][0]
    assert draws() == expected and train[0][0] == first and not set(first) & set(second)


def test_every_kind_of_member(tmp_path: Path) -> None:
    members = [
        ("x/", b""),
        ("x/1.jpg", picture(1, "JPEG")),
        ("x/1.json", b'{"label": 4, "caption": "one"}'),
        ("y/1.webp", picture(2, "WEBP")),
        ("y/1.json", b'{"caption": "two"}'),
        ("y/1.cls", b"2\n"),
        ("z.JPEG", picture(3, "JPEG")),
        ("z.cls", b"0"),
        ("z.seg.png", b"of another tool"),
        (f"{'long' * 60}.png", picture(4)),
        (f"{'long' * 60}.cls", b"7"),
        ("README", b""),
    ]
    write_tar(tmp_path / "train" / "a.tar", members)
    train = open_images(tmp_path, "train")
    assert [train.source.label(item) for item in range(len(train))] == [
        4,
        2,
        0,
        7,
    ] and train.num_classes == 8
    for item, member in enumerate((1, 3, 6, 9)):
        assert train.source.read(item) == members[member][1]
        assert (
            train.source.name(item) == f"{tmp_path}/train/a.tar:{members[member][0]} (image {item})"
        )
    assert train[0][0].mode == "RGB"


def test_the_index_is_kept_beside_the_tar_while_it_is_of_that_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "train" / "a.tar", samples(3))
    scanned: list[Path] = []
    scan = tars._scan
    monkeypatch.setattr(tars, "_scan", lambda path: scanned.append(path) or scan(path))
    assert [len(open_images(tmp_path, "train")) for _ in range(2)] == [3, 3] and len(scanned) == 1
    write_tar(path, samples(4))
    assert len(open_images(tmp_path, "train")) == 4 and len(scanned) == 2
    index = path.with_name("a.tar.index.npy")
    index.write_bytes(index.read_bytes()[:-5])
    assert len(open_images(tmp_path, "train")) == 4 and len(scanned) == 3
    index.unlink()
    index.mkdir()  # as a folder that cannot be written: nothing is kept, and everything works
    assert [len(open_images(tmp_path, "train")) for _ in range(2)] == [4, 4] and len(scanned) == 5
    assert not list(path.parent.glob("*.tmp"))


def test_a_tar_cut_at_any_place_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train" / "a.tar", samples(2))
    whole = path.read_bytes()
    end = max(i for i in range(0, len(whole), 512) if any(whole[i : i + 512])) + 512
    for size in (0, 100, *range(512, end, 700), end - 512, end - 1, end, end + 511):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError,
            match=r"^a tar takes all of its members, got .*a\.tar, which is cut short at ",
        ):
            open_images(tmp_path, "train")
    path.write_bytes(whole[: end + 512])
    train = open_images(tmp_path, "train")
    assert len(train) == 2
    path.write_bytes(whole[:600])
    with pytest.raises(ValueError, match=r"a\.tar, which was cut after it was indexed$"):
        [train[i] for i in range(2)]


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([], "tars take images, got none in "),
        ([("a.png", b"x")], 'a sample takes a .cls, or a .json with "label", got {path}:a without'),
        (
            [("a.png", b"x"), ("a.json", b"[")],
            'a sample takes a .cls, or a .json with "label", got {path}:a without',
        ),
        (
            [("a.cls", b"cat")],
            "a .cls takes a class' number from 0 on, got another in {path}:a.cls",
        ),
        ([("a.cls", b"-1")], "a .cls takes a class' number from 0 on, got another in {path}:a.cls"),
        (
            [("a.png", b"x"), ("a.jpg", b"x")],
            "a sample takes one image, got a second in {path}:a.jpg",
        ),
    ],
)
def test_bad_members_are_one_sentence(members: Members, sentence: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train" / "a.tar", members)
    with pytest.raises(ValueError) as error:
        open_images(tmp_path, "train")
    assert str(error.value).startswith(sentence.format(path=path)) and "\n" not in str(error.value)


def damage(root: Path, kind: str) -> str:
    """30 images of which one is none and one is cut; returns the name of the first."""
    members = samples(30)
    members[2 * 11] = ("011.png", b"not an image")
    members[2 * 12] = ("012.png", picture(12, size=64)[:-3000])
    if kind == "tar":
        return f"{write_tar(root / 'train' / 'a.tar', members)}:011.png (image 11)"
    for (name, data), (_, label) in zip(members[::2], members[1::2], strict=True):
        (root / "train" / label.decode()).mkdir(parents=True, exist_ok=True)
        (root / "train" / label.decode() / name).write_bytes(data)
    return f"{root / 'train' / '1' / '011.png'}"


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_an_image_that_cannot_be_read_is_named_or_skipped(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = damage(tmp_path, kind)
    train = open_images(tmp_path, "train")
    errors = []
    for i in range(30):
        try:
            train[i]
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) == 2 and all("\n" not in error for error in errors)
    assert f"an image takes a format that Pillow reads, got {name}: 12 bytes, is none" in errors

    skipping = open_images(tmp_path, "train", on_error="skip")
    with caplog.at_level(logging.WARNING):
        order = [skipping[i] for i in range(60)]
    assert len(caplog.messages) == 2 and sum(name in message for message in caplog.messages) == 1
    at = next(i for i in range(30) if skipping.order(i) == (11 if kind == "tar" else 4))
    taken = (
        (13, 3) if kind == "tar" else (21, 1)
    )  # the next in the tar, which skips the cut one too; or in the folder
    expected = picture(taken[0])
    assert (
        order[at][0].tobytes() == Image.open(io.BytesIO(expected)).tobytes()
        and order[at][1] == taken[1]
    )
    with pytest.raises(ValueError, match=r"^on_error takes .*, got 'ignore'$"):
        open_images(tmp_path, "train", on_error="ignore")


def test_images_of_which_none_can_be_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "a.tar", [("a.png", b"x"), ("a.cls", b"0")])
    with pytest.raises(ValueError, match=r"^images take one that can be read, got 1 that cannot$"):
        open_images(tmp_path, "train", on_error="skip")[0]


def test_bad_folders_are_one_sentence(tmp_path: Path) -> None:
    def fails(sentence: str, split: str) -> None:
        with pytest.raises(ValueError) as error:
            open_images(tmp_path, split)
        assert str(error.value).startswith(sentence) and "\n" not in str(error.value)

    write_folder(tmp_path / "train", 9)
    write_folder(tmp_path / "val", 2)
    (tmp_path / "empty").mkdir()
    fails(f"split takes a folder in {tmp_path}, got valid, and there is empty, train, val", "valid")
    fails(
        f"val takes the class folders of train, got {tmp_path}/val, which differs in class2", "val"
    )
    fails("path takes images in every class' folder, got ", "empty")
    (tmp_path / "train" / "class3").mkdir()
    fails("path takes images in every class' folder, got ", "train")
    with pytest.raises(
        ValueError, match=r"^split takes a folder in .*missing, got train, and there is none$"
    ):
        open_images(tmp_path / "missing", "train")


def test_labels_of_json_must_be_numbers() -> None:
    assert [
        tars._label(json.dumps({"label": label}).encode(), "json")
        for label in (3, -1, "3", 1.5, None)
    ] == [*(3, None, None, None, None)]
