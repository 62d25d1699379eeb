"""Section 2 of simclr_deepaug.py: drawn shapes, CIFAR, folders of pictures (broken ones too), batches."""
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import simclr_deepaug as S

CPU = torch.device("cpu")


def flags(root, *more):
    return S.settings(["--dataset", "folder", "--data-dir", str(root), "--workers", "0", *map(str, more)])


def save(path, width, height, seed=0, mode="RGB"):
    """A random smooth picture."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """folder(count, sizes) -> a root with classes cat and dog, `count` pictures in each, sizes in turn."""
    def make(count, sizes=((20, 20),), where="pictures"):
        root = tmp_path / where
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                save(root / name / f"{i:02}.png", *sizes[i % len(sizes)], seed=100 * c + i)
        return root
    return make


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


# --- drawn shapes -----------------------------------------------------------------------------------------------------

def test_shapes_are_a_function_of_their_seed():
    images, labels = S.draw_shapes(200, 3, "cpu")
    again, labels_again = S.draw_shapes(200, 3, "cpu")
    other, _ = S.draw_shapes(200, 4, "cpu")
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert (images != other).flatten(1).any(1).all()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    S.draw_shapes(20, 0, "cpu")
    assert torch.equal(torch.rand(3), expected)                    # the global random state is left alone


def test_shapes_have_20_balanced_classes_in_5_superclasses():
    """class // 4 is the family: families have their names, and the names say the same."""
    _, labels = S.draw_shapes(2000, 0, "cpu")
    assert labels.bincount().tolist() == [100] * 20
    train, test, classes = S.load_data("shapes", S.settings([]), CPU)
    assert len(train) == 8192 and len(test) == 2048 and len(classes) == 20 and train.size == 32
    assert [classes[c].split()[0] for c in range(20)] == [classes[4 * (c // 4)].split()[0] for c in range(20)]
    assert len({name.split()[0] for name in classes}) == 5
    assert not (train.images[:2048] == test.images).flatten(1).all(1).any()


def test_shapes_are_hard_from_pixels():
    """A linear probe of pixels or of random features reads little off 20 classes; nor do the 200 nearest neighbours.
    (The single nearest picture does better the more pictures there are: 49 % of 3,000, 67 % of all 8,192.)"""
    train, labels = S.draw_shapes(3000, 0, "cpu")
    test, test_labels = S.draw_shapes(500, 1, "cpu")
    small, small_test = (torch.nn.functional.avg_pool2d(x.float(), 4).flatten(1) for x in (train, test))
    x, q = train.float().flatten(1) / 255, test.float().flatten(1) / 255
    project = torch.randn(3072, 64, generator=torch.Generator().manual_seed(0))
    random, random_test = (x @ project).relu(), (q @ project).relu()
    assert S.linear_probe(small, labels, small_test, test_labels, 20)["linear"] < 25
    assert S.linear_probe(random, labels, random_test, test_labels, 20)["linear"] < 25
    assert S.weighted_knn(x, labels, q, test_labels, 20) < 25
    nearest = 100 * (labels[torch.cdist(q, x).argmin(1)] == test_labels).float().mean().item()
    print(f"the nearest of 3,000 pictures has the right class for {nearest:.0f} %")
    assert nearest < 60


# --- CIFAR ------------------------------------------------------------------------------------------------------------

def test_cifar100_through_torchvision(real_data):
    a = S.settings(["--dataset", "cifar100", "--data-dir", str(real_data)])
    train, test, classes = S.load_data("cifar100", a, CPU)
    assert train.images.shape == (50_000, 3, 32, 32) and test.images.shape == (10_000, 3, 32, 32)
    assert train.images.dtype == torch.uint8 and train.images.is_contiguous() and train.size == 32
    assert train.labels.bincount().tolist() == [500] * 100 and test.labels.bincount().tolist() == [100] * 100
    assert classes[0] == "apple" and classes[-1] == "worm" and len(classes) == 100
    mean = train.images.float().mean((0, 2, 3)) / 255                      # CIFAR-100's well-known channel means
    torch.testing.assert_close(mean, torch.tensor([0.5071, 0.4866, 0.4409]), rtol=0, atol=2e-4)


@pytest.mark.parametrize("damage", ["one byte", "cut", "absent"])
def test_damaged_cifar_is_refused_with_a_line_naming_download(real_data, tmp_path, capsys, damage):
    source, copy = real_data / "cifar-100-python", tmp_path / "cifar-100-python"
    copy.mkdir()
    for name in ("train", "meta"):
        os.symlink(source / name, copy / name)
    if damage != "absent":
        data = bytearray((source / "test").read_bytes())
        data[len(data) // 2] ^= 1
        (copy / "test").write_bytes(data if damage == "one byte" else data[:-1000])
    with pytest.raises(SystemExit) as stop:
        S.main(["--dataset", "cifar100", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "--download" in error and "\n" not in error and not (tmp_path / "run").exists()


# --- folders ----------------------------------------------------------------------------------------------------------

def test_class_folders_of_one_size_are_decoded_once(folder):
    """A tenth is held out, labels are the folders', pictures live in memory, bit for bit those of the files."""
    root = folder(25)
    train, test, classes = S.load_folder(flags(root), CPU)
    assert classes == ["cat", "dog"] and len(train) == 45 and len(test) == 5
    assert train.images.shape == (45, 3, 20, 20) and train.images.dtype == torch.uint8 and train.size == 20
    assert train.labels.tolist() == [f.parent.name == "dog" for f in train.files]
    assert not set(train.files) & set(test.files) and len(set(train.files) | set(test.files)) == 50
    assert set(test.labels.tolist()) == {0, 1}                                          # both classes are held out
    for split in (train, test):
        for picture, file in zip(split.images, split.files):
            assert np.array_equal(picture.permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))
    assert S.load_folder(flags(root, "--image-size", 12), CPU)[0].size == 12


def test_flat_folder_trains_without_labels(tmp_path, capsys):
    for i in range(20):
        save(tmp_path / f"{i}.png", 16, 16, seed=i)
    train, test, classes = S.load_folder(flags(tmp_path), CPU)
    assert train.labels is None and test.labels is None and len(train) == 18 and len(test) == 2
    assert "no labels" in capsys.readouterr().out
    images, labels = next(S.train_batches(train, flags(tmp_path, "--batch-size", 4), CPU, 0, 4, 0, 1))
    assert images.shape == (4, 3, 16, 16) and labels is None


@pytest.mark.parametrize("name", ["test", "val"])
def test_train_and_test_folders(folder, name):
    root = folder(6, where="root/train").parent
    folder(3, where=f"root/{name}")
    train, test, classes = S.load_folder(flags(root), CPU)
    assert len(train) == 12 and len(test) == 6 and classes == ["cat", "dog"]
    assert all(root / "train" in f.parents for f in train.files)
    assert all(root / name in f.parents for f in test.files) and sorted(test.labels.tolist()) == [0] * 3 + [1] * 3
    assert test.labels.tolist() == [f.parent.name == "dog" for f in test.files]


def test_different_sizes_are_streamed(folder):
    """Nothing is kept in memory; the view's side is 224 or --image-size."""
    train, test, _ = S.load_folder(flags(folder(12, ((20, 30), (33, 21), (64, 64)))), CPU)
    assert train.images is None and train.size == 224 and len(train) == 21 and train.labels.shape == (21,)
    a = flags(train.files[0].parent.parent, "--image-size", 16, "--batch-size", 5)
    train, test, _ = S.load_folder(a, CPU)
    images, labels = next(S.train_batches(train, a, CPU, 0, 4, 0, 1))
    assert train.size == 16 and images.shape == (5, 2, 3, 16, 16) and images.dtype == torch.uint8
    assert S.two_views(images, train, a).shape == (10, 3, 16, 16)
    assert (images[:, 0] != images[:, 1]).flatten(1).any(1).all()                     # two crops of each


def test_one_size_that_is_not_square_stays_in_memory(folder):
    train, _, _ = S.load_folder(flags(folder(6, ((40, 24),)), "--image-size", 16), CPU)
    assert train.images.shape == (10, 3, 24, 40) and train.size == 16


@pytest.mark.parametrize("mode, ending", [("L", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("RGB", "jpg"),
                                          ("CMYK", "jpg"), ("RGB", "bmp"), ("RGB", "webp"), ("RGB", "PNG")])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode, ending):
    for i in range(12):
        save(tmp_path / "a" / f"{i}.{ending}", 8, 8, seed=i, mode=mode)
    train, test, _ = S.load_folder(flags(tmp_path), CPU)
    assert len(train) == 10 and train.images.shape[1:] == (3, 8, 8) and not train.broken | test.broken
    expected = np.asarray(Image.open(train.files[0]).convert("RGB"))
    assert np.array_equal(train.images[0].permute(1, 2, 0).numpy(), expected)


def broken_folder(folder, sizes):
    """24 pictures in train, of which one PNG is cut short and one is a text file; 6 whole ones in test."""
    folder(3, sizes, "pictures/test")
    root = folder(12, sizes, "pictures/train")
    truncate(root / "cat" / "03.png")
    (root / "dog" / "05.png").write_text("not a picture")
    return root.parent


def test_broken_pictures_in_memory_are_skipped_and_named_once(folder, capfd):
    """Labels still belong to their pictures."""
    root = broken_folder(folder, ((20, 20),))
    train, test, _ = S.load_folder(flags(root), CPU)
    assert len(train) == 22 and len(train.labels) == 22 and len(test) == 6
    assert {f.name for f in train.broken} == {"03.png", "05.png"} and not test.broken
    told = "".join(capfd.readouterr())
    assert told.count("03.png") == 1 and told.count("05.png") == 1
    left = [f for f in train.files if f not in train.broken]
    for picture, label, file in zip(train.images, train.labels, left):
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))
        assert ["cat", "dog"][label] == file.parent.name


def test_broken_pictures_while_streaming_are_replaced_and_named_once(folder, capfd):
    """Training: the next readable one, with its own label; evaluation: left out."""
    root = broken_folder(folder, ((20, 20), (24, 20)))
    a = flags(root, "--image-size", 8, "--batch-size", 7)
    train, test, _ = S.load_folder(a, CPU)
    assert len(train) == 24 and train.images is None
    batches = S.train_batches(train, a, CPU, 0, 3, 0, 1)
    seen = [next(batches) for _ in range(9)]                                            # three epochs of 21
    assert all(len(images) == 7 == len(labels) for images, labels in seen)
    x, index = zip(*S.eval_batches(train, a, CPU, batch_size=4))
    index = torch.cat(index)
    assert len(torch.cat(x)) == 22 == len(index.unique())
    assert {train.files[i].name for i in set(range(24)) - set(index.tolist())} == {"03.png", "05.png"}
    told = "".join(capfd.readouterr())
    assert told.count("03.png") == 1 and told.count("05.png") == 1 and len(train.broken) == 2


def test_broken_pictures_are_counted_in_the_report(folder, tmp_path):
    """A whole run on pictures of different sizes with --image-size, two of them broken."""
    root = broken_folder(folder, ((20, 20), (24, 20)))
    report = S.main(["--dataset", "folder", "--data-dir", str(root), "--workers", "0", "--image-size", "16", "--epochs",
                     "1", "--batch-size", "12", "--out", str(tmp_path / "run")])
    assert report["broken_pictures"] == 2 and report["steps"] == 2 and (tmp_path / "run" / "encoder.pt").exists()
    assert {"linear", "linear_untrained", "knn"} <= set(report)


def test_a_run_with_three_test_pictures_ends_with_a_report(folder, tmp_path):
    """CKA needs four pictures; that must cost no more than the map of the layers."""
    S.main(["--dataset", "folder", "--data-dir", str(folder(12)), "--workers", "0", "--epochs", "1", "--batch-size",
            "10", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.json").exists() and (tmp_path / "run" / "curves.png").exists()


def test_layer_map_with_broken_pictures_in_the_middle_of_the_test_part(folder):
    """Streaming leaves them out, so batches come short; the map is that of the same pictures without them."""
    root = folder(300, ((16, 16),))
    files = sorted(root.rglob("*.png"))
    truncate(files[70])
    a = flags(root, "--image-size", "16", "--layer", "none")
    with_broken, without = S.Split(None, 16, files=files), S.Split(None, 16, files=files[:70] + files[71:])
    torch.manual_seed(0)
    net = S.Net(a, 16, torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(S.layer_map(net, with_broken, a, CPU), S.layer_map(net, without, a, CPU), rtol=0,
                               atol=0.02)


@pytest.mark.parametrize("case", ["absent", "empty", "only text", "no train beside test", "all text", "all truncated",
                                  "test part truncated"])
def test_folders_that_cannot_be_used_get_one_line(tmp_path, folder, capsys, case):
    root = tmp_path / "pictures"
    if case in ("all text", "all truncated", "test part truncated"):
        folder(4, where="pictures/train")
        folder(1, where="pictures/test")
        for file in (root / "test" if case.startswith("test") else root).rglob("*.png"):
            truncate(file) if case.endswith("truncated") else file.write_text("no picture")
    elif case == "no train beside test":
        save(root / "test" / "a" / "1.png", 8, 8)
    elif case != "absent":
        root.mkdir()
        if case == "only text":
            (root / "readme.txt").write_text("nothing here")
    with pytest.raises(SystemExit) as stop:
        S.main(["--dataset", "folder", "--data-dir", str(root), "--workers", "0", "--batch-size", "2", "--epochs", "1",
                "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and error[-1].startswith("simclr_deepaug.py: error: ") and str(root) in error[-1]
    assert not any("Traceback" in line for line in error)


# --- batches ----------------------------------------------------------------------------------------------------------

def numbered_split(n):
    """Pictures that carry their own number in their pixels, labels that repeat it."""
    images = (torch.arange(n).view(n, 1, 1, 1) * torch.ones(1, 3, 2, 2)).to(torch.uint8)
    return S.Split(torch.arange(n), 2, images=images)


def epoch_of(split, a, step, steps, count, rank=0, world=1):
    batches = S.train_batches(split, a, CPU, step, steps, rank, world)
    pairs = [next(batches) for _ in range(count)]
    for images, labels in pairs:
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
    return [labels.tolist() for _, labels in pairs]


def test_every_epoch_is_a_permutation_without_repeats():
    """The ragged rest is dropped; another epoch, another seed: another order."""
    a, split = S.settings(["--batch-size", "8"]), numbered_split(50)
    order = epoch_of(split, a, 0, 6, 18)
    epochs = [sum(order[i:i + 6], []) for i in (0, 6, 12)]
    for epoch in epochs:
        assert len(epoch) == 48 == len(set(epoch)) and epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != epochs[2]
    assert len({*range(50)} - {*epochs[0]} | {*range(50)} - {*epochs[1]} | {*range(50)} - {*epochs[2]}) > 2
    other = epoch_of(split, S.settings(["--batch-size", "8", "--seed", "1"]), 0, 6, 6)
    assert sum(other, []) != epochs[0]


@pytest.mark.parametrize("start", [1, 5, 6, 13])
def test_batches_from_a_later_step_are_those_of_an_uninterrupted_run(start):
    a, split = S.settings(["--batch-size", "8"]), numbered_split(50)
    assert epoch_of(split, a, start, 6, 18 - start) == epoch_of(split, a, 0, 6, 18)[start:]


def test_ranks_are_disjoint_and_together_make_the_epoch():
    """Two processes see, step by step, halves of the batches of one process."""
    split, a = numbered_split(50), S.settings(["--batch-size", "8"])
    ranks = [epoch_of(split, a, 0, 6, 6, rank, 2) for rank in (0, 1)]
    assert not set(sum(ranks[0], [])) & set(sum(ranks[1], []))
    assert [x + y for x, y in zip(*ranks)] == epoch_of(split, a, 0, 6, 6)


def test_streamed_crops_are_a_function_of_seed_epoch_and_picture(folder):
    """The same crops after a resume in the middle of an epoch, and with 0 or 1 workers; others in the next epoch."""
    root = folder(10, ((20, 20), (24, 20)))
    more = "--image-size", 8, "--batch-size", 4
    a, one = flags(root, *more), flags(root, *more)
    one.workers = 1
    train, _, _ = S.load_folder(a, CPU)
    torch.manual_seed(0)
    batches = S.train_batches(train, a, CPU, 0, 4, 0, 1)
    whole = [next(batches)[0] for _ in range(8)]
    for settings, start in ((a, 2), (a, 5), (one, 0)):
        torch.manual_seed(start + 1)                                 # the crops do not depend on the global state
        batches = S.train_batches(train, settings, CPU, start, 4, 0, 1)
        for expected in whole[start:start + 5]:
            assert torch.equal(next(batches)[0], expected)
        batches.close()
    assert not any(torch.equal(x, y) for x in torch.cat(whole[:4]) for y in torch.cat(whole[4:]))
    a.seed = 1
    assert not torch.equal(next(S.train_batches(train, a, CPU, 0, 4, 0, 1))[0], whole[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_streaming_leaves_the_global_random_state_alone(folder, workers):
    """Views are drawn from it after the batch is fetched: a loader that took a number from it where an epoch starts,
    or where a resumed run starts, would give the resumed run other views."""
    root = folder(10, ((20, 20), (24, 20)))
    a = flags(root, "--image-size", 8, "--batch-size", 4)
    a.workers = workers
    train, _, _ = S.load_folder(a, CPU)
    batches = S.train_batches(train, a, CPU, 0, 4, 0, 1)
    for _ in range(6):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        next(batches)
        assert torch.equal(torch.get_rng_state(), before)
    batches.close()


def test_eval_batches_come_in_order_with_their_numbers(folder):
    split, a = numbered_split(50), S.settings([])
    x, index = zip(*S.eval_batches(split, a, CPU, batch_size=16))
    assert [len(b) for b in x] == [16, 16, 16, 2] and torch.cat(index).tolist() == list(range(50))
    assert torch.equal((torch.cat(x)[:, 0, 0, 0] * 255).round().long(), torch.arange(50))
    assert torch.cat([i for _, i in S.eval_batches(split, a, CPU, 7, 4)]).tolist() == list(range(7))
    a = flags(folder(8, ((20, 20), (24, 20))), "--image-size", 8)
    train, _, _ = S.load_folder(a, CPU)
    x, index = zip(*S.eval_batches(train, a, CPU, batch_size=5))
    assert torch.cat(index).tolist() == list(range(14)) and torch.cat(x).shape == (14, 3, 8, 8)
    for picture, file in zip(torch.cat(x), train.files):             # the worker rounds to 8 bits: half a level
        image = v2.functional.pil_to_tensor(Image.open(file)).float() / 255
        expected = v2.functional.center_crop(v2.functional.resize(image, [8], antialias=True), [8, 8])
        torch.testing.assert_close(picture, expected, rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (20, 40, 16), (40, 20, 16), (10, 13, 24), (32, 32, 16)])
def test_to_unit_equals_torchvisions_resize_and_centre_crop(height, width, size):
    """On floats: PIL's own result, which rounds to 8 bits, differs by at most one level."""
    images = v2.functional.resize(S.draw_shapes(4, 0, "cpu")[0], [height, width])
    got = S.to_unit(images, size)
    assert got.shape == (4, 3, size, size) and got.dtype == torch.float32
    assert got.min() >= 0 and got.max() <= 1
    square = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    torch.testing.assert_close(got, square(images.float() / 255), rtol=0, atol=1e-6)
    for picture, view in zip(images, got):
        pil = v2.functional.pil_to_tensor(square(v2.functional.to_pil_image(picture))).float() / 255
        torch.testing.assert_close(view, pil, rtol=0, atol=1.51 / 255)


def test_copied_data_can_be_removed_while_it_is_in_memory(folder):
    """One size: nothing is read after loading."""
    root = folder(12)
    a = flags(root, "--batch-size", 4)
    train, test, _ = S.load_folder(a, CPU)
    shutil.rmtree(root)
    assert len(next(S.train_batches(train, a, CPU, 0, 5, 0, 1))[0]) == 4
    assert len(next(S.eval_batches(test, a, CPU))[0]) == 3


# --- Food-101's layout ------------------------------------------------------------------------------------------------

def food(root, sizes=((20, 20),)):
    """DIR/images/CLASS/*.jpg and the lists, class by class: of each class 12 to train, 4 to test, 2 in no list."""
    lists = {"train": [], "test": []}
    for c, name in enumerate(("apple_pie", "baby_back_ribs", "ceviche")):
        for i in range(18):
            save(root / "images" / name / f"{1000 * c + i}.jpg", *sizes[i % len(sizes)], seed=100 * c + i)
            if i < 16:
                lists["test" if i % 4 == 0 else "train"].append(f"{name}/{1000 * c + i}")
    (root / "meta").mkdir()
    for split, lines in lists.items():
        (root / "meta" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return lists


def test_food101_split_and_labels_are_as_the_lists_say(tmp_path):
    """Each list's pictures with the class in their line; those in no list are in no split; classes come mixed."""
    lists = food(tmp_path)
    train, test, classes = S.load_folder(flags(tmp_path), CPU)
    assert classes == ["apple_pie", "baby_back_ribs", "ceviche"]
    for split, part in (("train", train), ("test", test)):
        names = [f"{f.parent.name}/{f.stem}" for f in part.files]
        assert sorted(names) == sorted(lists[split]) and names != lists[split]
        assert [classes[y] for y in part.labels] == [n.split("/")[0] for n in names]
        for picture, name in zip(part.images, names):
            file = Image.open(tmp_path / "images" / f"{name}.jpg")
            assert np.array_equal(picture.permute(1, 2, 0).numpy(), np.asarray(file.convert("RGB")))
    assert (len(train), len(test)) == (36, 12) and len(set(train.labels[:12].tolist())) == 3


def test_food101_of_different_sizes_is_streamed_and_a_missing_file_is_named(tmp_path, capfd):
    lists = food(tmp_path, ((20, 20), (24, 20)))
    (tmp_path / "images" / f"{lists['test'][5]}.jpg").unlink()
    a = flags(tmp_path, "--image-size", 8)
    train, test, classes = S.load_folder(a, CPU)
    assert train.images is None and (len(train), len(test)) == (36, 12)
    x, index = (torch.cat(parts) for parts in zip(*S.eval_batches(test, a, CPU)))
    names = [f"{test.files[i].parent.name}/{test.files[i].stem}" for i in index]
    assert x.shape == (11, 3, 8, 8) and sorted(names) == sorted({*lists["test"]} - {lists["test"][5]})
    assert [classes[y] for y in test.labels[index]] == [n.split("/")[0] for n in names]
    assert capfd.readouterr().out.count(f"{lists['test'][5]}.jpg") == 1 and len(test.broken) == 1
