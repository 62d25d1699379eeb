"""Whole runs of vicreg_probe.py on a few drawn pictures: folder, probes, export, figures, resume, two processes."""
import csv
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from conftest import same_bits
from PIL import Image
from safetensors.torch import load_file

import simclr_deepaug as S
import vicreg_probe as V

CPU = torch.device("cpu")
ROOT = Path(V.__file__).parent
LEVELS = ("sample", "class", "superclass")
EVERYTHING = ["--sample-level", "6", "4", "2", "--target-net", "RES-1-8", "--target-epochs", "2", "--target-stages",
              "3", "--mine-steps", "5", "--probes", "svm", "ncc", "logistic", "--probe-epochs", "0", "1", "2", "3"]


def flags(data, *more):
    """Two epochs of a network of one block; of the probes the cheapest alone. data: a folder, or "shapes"."""
    where = ["--dataset", "shapes"] if data == "shapes" else ["--dataset", "folder", "--data-dir", str(data)]
    return [*where, "--workers", "0", "--arch", "RES-1-8", "--projector", "16", "16", "--batch-size", "36",
            "--epochs", "2", "--device", "cpu", "--sample-level", "0", "0", "0", "--target-net", "none",
            "--mine-steps", "0", "--probes", "ncc", *map(str, more)]


def quick(*words):
    """main without the figures, which take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V, "draw_run", lambda folder: folder / "figures.png")
        return V.main([*map(str, words)])


@pytest.fixture(scope="module", autouse=True)
def small_shapes():
    """The drawn data set, a sixteenth of it: 512 and 128 pictures of 20 classes in 5 superclasses."""
    draw = V.draw_shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V, "draw_shapes", lambda n, seed, device: draw(n // 16, seed, device))
        yield


@pytest.fixture(scope="module")
def done(small_shapes, tmp_path_factory):
    """A finished run of 3 epochs with every probe after every epoch; tests read its folder and change nothing."""
    out = tmp_path_factory.mktemp("done") / "everything"
    V.main(flags("shapes", *EVERYTHING, "--epochs", 3, "--batch-size", 64, "--out", out))
    return out


@pytest.fixture(scope="module")
def live(done):
    """The trained network of `done`, in eval mode."""
    a, net, *_ = build("shapes")
    net.load_state_dict(model_of(done))
    return net.eval()


def build(data, *more):
    """(settings, network, train split, test split, classes)"""
    a = V.settings(flags(data, *more))
    train, test, classes = V.load_data(a.dataset, a, CPU)
    return a, V.build(a, train.size, classes, CPU), train, test, classes


def load(run):
    return torch.load(Path(run) / "checkpoint.pt", weights_only=True)


def model_of(run):
    return load(run)["model"]


def report_of(run):
    return json.loads((Path(run) / "report.json").read_text())


def rows_of(run, name="probes.csv"):
    """The rows of a table as the script writes it; numbers as floats, so that 1 and 1.0 are the same."""
    def value(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(Path(run) / name) as f:
        return [{k: value(v) for k, v in r.items()} for r in csv.DictReader(f)]


def by_key(run):
    rows = rows_of(run)
    table = {(r["epoch"], r["layer"], r["target"]): r for r in rows}
    assert len(table) == len(rows), "two rows for the same epoch, layer and target"
    return table


# --- the run folder ---------------------------------------------------------------------------------------------------

def assert_drawn(path, colours=50):
    """A whole PNG with more on it than empty axes."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert min(picture.shape[:2]) > 400 and len(np.unique(picture.reshape(-1, 3), axis=0)) > colours


def test_run_folder_holds_every_file_and_no_leftover(done):
    names = {p.name for p in done.iterdir()}
    assert {"config.json", "metrics.csv", "checkpoint.pt", "encoder.pt", "weights.safetensors", "report.json",
            "probes.csv", "information.csv", "targets.npz", "clusters.npz", "samples.npz", "figures.png",
            "clusters.png"} == names
    for picture in done.glob("*.png"):
        assert_drawn(picture)


def test_config_holds_flags_versions_and_the_scripts_own_hash(done):
    config = json.loads((done / "config.json").read_text())
    assert config["torch"] == torch.__version__ and config["torchvision"] == torchvision.__version__
    assert config["python"] == sys.version and config["device"] == "cpu" and config["processes"] == 1
    assert config["script_sha256"] == hashlib.sha256(Path(V.__file__).read_bytes()).hexdigest()
    assert config["representation"] == "block1.even" and config["probe_epochs"] == [0, 1, 2, 3]
    assert set(vars(V.settings([]))) <= config.keys()


def test_metrics_hold_the_losss_parts_and_the_collapse_meters(done):
    rows = rows_of(done, "metrics.csv")
    assert list(rows[0]) == ["step", "epoch", "lr", "images_per_second", "loss", "invariance", "regularisation",
                             "variance_term", "covariance_term", "embedding_std", "effective_rank", "alignment",
                             "uniformity"]
    assert [r["step"] for r in rows] == [8, 10, 16, 20, 24] and rows[-1]["epoch"] == 3
    for r in rows:
        assert all(math.isfinite(v) for v in r.values()) and r["images_per_second"] > 0
        assert r["loss"] == pytest.approx(r["invariance"] + r["regularisation"], rel=1e-5)
        assert r["regularisation"] == pytest.approx(25 * r["variance_term"] + r["covariance_term"], rel=1e-5)


def test_probes_are_one_row_per_epoch_layer_and_target(done):
    """The levels at every layer and epoch; random targets at the representation, after training at every layer."""
    table, random = by_key(done), ("random 1.00", "random 0.50", "random 0.00")
    expected = {(e, layer, t) for e in range(4) for layer in ("stem", "block1") for t in (*LEVELS, *random)
                if not t.startswith("random") or layer == "block1" or e == 3}
    assert set(table) == expected
    assert list(rows_of(done)[0]) == ["epoch", "layer", "target", "classes", *V.MEASURES]
    for (_, layer, target), row in table.items():
        assert row["classes"] == {"sample": 6, "superclass": 5}.get(target, 20)
        for measure in ("majority", "svm", "ncc_train", "ncc_test"):
            assert 0 <= row[measure] <= 100
        assert row["cdnv"] > 0 and row["variance"] > 0 and row["distance"] > 0
        assert (row["logistic"] != "") == (row["logistic_decay"] != "") == (target in LEVELS)
        assert (row["knn"] != "") == (layer == "block1" and target == "class")


def test_probes_measure_the_layers_and_targets_that_they_name(done, live):
    """NCC after training with a loop over classes, from features taken here: classes and random targets, both layers;
    the share of the commonest test target too."""
    table, (_, _, train, test, _) = by_key(done), build("shapes")
    with torch.no_grad():
        acts, acts_test = (live.activations(V.to_unit(s.images, 32)) for s in (train, test))
    with np.load(done / "targets.npz") as f:
        targets = {f"random {r:.2f}": (torch.from_numpy(y), torch.from_numpy(y_test))
                   for r, y, y_test in zip(f["randomness"], f["train"], f["test"])}
    targets["class"] = train.labels, test.labels
    targets["superclass"] = train.labels // 4, test.labels // 4
    for layer, name in (("stem", "stem"), ("block1", "block1.even")):
        x, x_test = acts[name].mean((2, 3)), acts_test[name].mean((2, 3))
        for target, (y, y_test) in targets.items():
            present = y.unique()
            means = torch.stack([x[y == c].mean(0) for c in present])
            for part, features, labels in (("train", x, y), ("test", x_test, y_test)):
                nearest = present[((features.unsqueeze(1) - means) ** 2).sum(2).argmin(1)]
                expected = 100 * (nearest == labels).float().mean().item()
                assert table[3, layer, target][f"ncc_{part}"] == pytest.approx(expected, abs=0.8), (layer, target)
            assert table[3, layer, target]["majority"] == pytest.approx(100 * y_test.bincount().max() / len(y_test))


def test_random_targets_lead_from_an_untrained_network_to_a_trained_one(done):
    """Made once, before training, for every picture; a trained network's are nearer to the labels."""
    with np.load(done / "targets.npz") as f:
        assert f["randomness"].tolist() == [1, 0.5, 0]
        assert f["train"].shape == (3, 512) and f["test"].shape == (3, 128) and f["train"].dtype == np.int64
        assert 0 <= f["train"].min() and f["train"].max() < 20
        first = f["train"][0]
    a, _, train, test, classes = build("shapes", *EVERYTHING, "--target-epochs", 10)
    targets = V.random_targets(a, "RES-1-8", train, test, classes, CPU)
    right = [(t["train"] == train.labels).float().mean() for t in targets]
    assert right[0] < 0.08 and right[2] > 0.1, right                 # measured: .04, .06, .12
    assert (targets[0]["train"].numpy() == first).all()              # the untrained network is the same one


def test_information_is_one_row_a_probed_epoch(done):
    rows = rows_of(done, "information.csv")
    assert [r["epoch"] for r in rows] == [0, 1, 2, 3] and all(math.isfinite(r["bits"]) and r["std"] > 0 for r in rows)
    report = report_of(done)
    assert report["information_bits"] == rows[3]["bits"] and report["information_bits_untrained"] == rows[0]["bits"]


def test_clusters_are_the_features_of_five_of_each_level(done, live):
    with np.load(done / "clusters.npz") as f:
        assert {f"{when}.{t}_{v}" for when in ("before", "after") for t in LEVELS for v in "xy"} == set(f)
        for k, v in f.items():
            if k.endswith("y"):
                assert len(np.unique(v)) == 5 and len(f[k[:-1] + "x"]) == len(v)
        _, _, _, test, _ = build("shapes")
        with torch.no_grad():
            x = live.features(V.to_unit(test.images, 32)).numpy()
        for point, label in zip(f["after.class_x"], f["after.class_y"]):
            i = np.abs(x - point).max(1).argmin()
            assert np.allclose(x[i], point, atol=1e-5) and test.labels[i] == label
        assert not np.allclose(f["before.class_x"], f["after.class_x"])


def test_report_holds_the_representations_measurements_flat(done):
    """Before and after training, by level, as in probes.csv; linear and knn are those of the classes."""
    report, table = report_of(done), by_key(done)
    assert {"seconds", "images_per_second", "loss", "export_difference", "lowest_embedding_std"} <= report.keys()
    assert report["steps"] == 24 and report["epochs"] == 3 and report["layers_augmented"] == []
    assert report["seconds"] > 0 and report["export_difference"] <= 1e-4 and report["broken_pictures"] == 0
    for suffix, epoch in (("_untrained", 0), ("", 3)):
        for level in LEVELS:
            for measure in ("svm", "ncc_train", "ncc_test", "cdnv", "variance", "distance"):
                assert report[f"{measure}_{level}{suffix}"] == table[epoch, "block1", level][measure]
        assert report[f"linear{suffix}"] == table[epoch, "block1", "class"]["logistic"]
        assert report[f"knn{suffix}"] == table[epoch, "block1", "class"]["knn"]
    assert report["flags"] == {k: v for k, v in json.loads((done / "config.json").read_text()).items()
                               if k in report["flags"]}


def test_probing_changes_no_bit_of_training(done, tmp_path):
    """Every probe after every epoch, or the cheapest before and after training: the same weights, BatchNorm and
    optimizer."""
    quick(*flags("shapes", "--epochs", 3, "--batch-size", 64, "--probe-epochs", 0, "--out", tmp_path / "run"))
    assert {r["epoch"] for r in rows_of(tmp_path / "run")} == {0, 3}
    ours, theirs = load(tmp_path / "run"), load(done)
    assert same_bits(ours["model"], theirs["model"]) and same_bits(ours["optimizer"], theirs["optimizer"])


# --- the export -------------------------------------------------------------------------------------------------------

def test_encoder_equals_the_live_network_and_names_its_layers(done, live):
    extra = {"config.json": ""}
    encoder = torch.jit.load(done / "encoder.pt", _extra_files=extra)
    config, x = json.loads(extra["config.json"]), torch.rand(5, 3, 32, 32)
    assert config["layers"] == ["stem", "block1.odd", "block1.even", "avgpool", "head"]
    assert config["layer_numbers"] == {"stem": 0, "block1.even": 1, "avgpool": 2, "head": 3}
    assert config["script"] == "vicreg_probe" and config["dataset"] == "shapes" and len(config["classes"]) == 20
    assert config["image_size"] == 32 and config["dim"] == 8 and config["flags"]["arch"] == "RES-1-8"
    assert config["measurements"]["linear"] == report_of(done)["linear"]
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), live.features(x), rtol=1e-4, atol=1e-5)
        h = live.layers["stem"](live.layers["input"](x))             # the order and the values, layer by layer
        block = live.layers["block1"](h)
        expected = [h, None, block, block.mean((2, 3)), live.layers["head"](block.mean((2, 3)))]
        ours = encoder.activations(x)
    assert len(ours) == 5
    torch.testing.assert_close(torch.relu(ours[1] + h), block, rtol=1e-4, atol=1e-5)    # odd: before x and the ReLU
    for theirs, mine in zip(expected, ours):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_weights_have_the_keys_of_torchvisions_resnets(done, live):
    """A RES-L-H: its blocks are layer1.0, layer1.1, ...; nothing of the projector or of the normalisation."""
    weights = load_file(done / "weights.safetensors")
    block = {f"layer1.0.{k}": v for k, v in live.layers["block1"].state_dict().items()}
    stem = live.layers["stem"].state_dict()
    assert {"conv1.weight", "bn1.running_var", "conv2.weight", "bn2.bias"} <= stem.keys()
    assert same_bits(dict(sorted(weights.items())), dict(sorted({**stem, **block}.items())))


@pytest.mark.parametrize("size", [16, 64])
def test_weights_of_resnet18_load_into_torchvision_and_give_the_same_features(tmp_path, size):
    """Only fc is missing; below 64 px the stem is 3x3 without max pooling, from 64 px on torchvision's own."""
    a, net, _, test, classes = build("shapes", "--arch", "resnet18", "--image-size", size)
    test.images, test.labels = test.images[:8], test.labels[:8]
    for m in net.eval().modules():                                   # as after training: statistics of its own
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    assert V.export(a, net, test, classes, tmp_path, {}) <= 1e-4
    theirs = torchvision.models.resnet18(weights=None).eval()
    if size < 64:
        theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    missing, unexpected = theirs.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and unexpected == []
    theirs.fc, x = torch.nn.Identity(), torch.rand(3, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(net.layers["input"](x)), net.features(x), rtol=1e-4, atol=1e-5)


def test_pt2_reloads_to_the_same_numbers_at_other_batch_sizes(live, tmp_path):
    a, _, _, test, classes = build("shapes", "--export", "pt2")
    V.export(a, live, test, classes, tmp_path, {})
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    for n in (1, 7):
        x = torch.rand(n, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(program(x), live.features(x), rtol=1e-4, atol=1e-5)


def test_samples_are_the_test_pictures(done):
    _, _, _, test, _ = build("shapes")
    with np.load(done / "samples.npz") as f:
        assert (f["images"] == test.images.numpy()).all() and (f["labels"] == test.labels.numpy()).all()


# --- figures ----------------------------------------------------------------------------------------------------------

def test_figures_come_from_recorded_numbers_alone(done, straight, tmp_path):
    """Nothing but tables, settings and kept points left: --figures draws the same pages again, pixel by pixel, and of
    two runs their comparison."""
    runs = [tmp_path / "everything", tmp_path / "other"]
    for run, source in zip(runs, (done, straight)):
        run.mkdir()
        for f in source.iterdir():
            if f.suffix in (".csv", ".json", ".npz"):
                shutil.copy(f, run / f.name)
    V.main(["--figures", str(runs[0])])
    assert not (tmp_path / "comparison.png").exists()
    for name in ("figures.png", "clusters.png"):
        first, again = (np.asarray(Image.open(f / name)) for f in (done, runs[0]))
        assert first.shape == again.shape and (first == again).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V, "draw_run", lambda folder: folder)
        assert V.main(["--figures", *map(str, runs)])["comparison"] == str(tmp_path / "comparison.png")
    assert_drawn(tmp_path / "comparison.png")
    assert {f.name for f in tmp_path.iterdir()} == {"everything", "other", "comparison.png"}


# --- same seed, every option ------------------------------------------------------------------------------------------

def train(data, out, *more, steps=2):
    """Two epochs of `steps` steps without probes: (weights, what train() returned)."""
    a, net, split, *_ = build(data, *more)
    out.mkdir()
    report = V.train(a, net, split, out, CPU, steps, lambda epoch, stop: None, None)
    return {k: v.clone() for k, v in net.state_dict().items()}, report


@pytest.fixture(scope="module")
def plain(few, tmp_path_factory):
    return train(few, tmp_path_factory.mktemp("plain") / "run")


def test_same_seed_same_bits_other_seed_others(few, tmp_path, plain):
    assert same_bits(train(few, tmp_path / "again")[0], plain[0])
    assert not same_bits(train(few, tmp_path / "other", "--seed", 1)[0], plain[0])


@pytest.mark.parametrize("more", [
    "--layer -1", "--layer 0", "--layer 1", "--layer 1 --no-stop-grad", "--layer 2", "--layer 3", "--layer all",
    "--layer 1 --rate 0.1", "--layer 1 --sample 1 --no-stop-grad", "--layer 0 --transform channel",
    "--layer 0 --transform pca", "--layer 0 --transform pca --components 3", "--optimizer lars", "--blur 1",
    "--solarize 1", "--crop-min 0.9", "--objective simclr", "--objective simclr --temperature 0.1",
    "--objective supervised", "--objective supervised-autoaugment", "--invariance 1", "--variance 1",
    "--covariance 25", "--weight-decay 0.1", "--lr 0.037", "--image-size 24", "--batch-size 18"])
def test_every_option_trains_and_changes_the_result(few, tmp_path, plain, seen, more):
    """Four steps: finite loss and weights, other than those without the option, and than any other option's."""
    weights, report = train(few, tmp_path / "run", *more.split())
    assert math.isfinite(report["loss"]) and all(v.isfinite().all() for v in weights.values())
    stem = weights["layers.stem.conv1.weight"]
    assert not torch.equal(stem, plain[0]["layers.stem.conv1.weight"])
    assert not [other for other, theirs in seen.items() if torch.equal(stem, theirs)]
    seen[more] = stem


@pytest.fixture(scope="module")
def seen():
    return {}


def test_stop_gradient_of_all_rows_leaves_the_layers_below_untrained(few, tmp_path):
    """--layer 1 --sample 1: no row sends a gradient below block 1; the projector above it learns."""
    _, net, *_ = build(few)
    weights, _ = train(few, tmp_path / "run", "--layer", 1, "--sample", 1, "--weight-decay", 0)
    start = dict(net.named_parameters())
    for k in start:
        assert torch.equal(weights[k], start[k]) == (".head." not in k), k


def test_autoaugment_is_other_pictures_than_the_plain_supervised(few):
    """supervised shows the pictures as they are, once; supervised-autoaugment changes most, differently each step."""
    _, _, split, *_ = build(few)
    plain, *augmented = [V.train_views(split.images[:32], split, V.settings(flags(few, "--objective", kind)))
                         for kind in ("supervised", *["supervised-autoaugment"] * 10)]
    assert torch.equal(plain, split.images[:32] / 255) and all(x.shape == plain.shape for x in augmented)
    assert len({x.sum().item() for x in augmented}) == 10
    changed = [not torch.equal(x, y) for pictures in augmented for x, y in zip(plain, pictures)]
    assert statistics.mean(changed) > 0.5


@pytest.mark.parametrize("objective", ["simclr", "supervised", "supervised-autoaugment"])
def test_other_objectives_run_to_the_end(few, tmp_path, objective):
    """Their metrics are their own; the head of the export is the classifier if supervised."""
    report = quick(*flags(few, "--objective", objective, "--out", tmp_path / "run"))
    columns, supervised = list(rows_of(tmp_path / "run", "metrics.csv")[0]), objective != "simclr"
    assert columns[:5] == ["step", "epoch", "lr", "images_per_second", "loss"]
    assert columns[5:] == ([] if supervised else ["invariance", "regularisation", "embedding_std", "effective_rank",
                                                  "alignment", "uniformity"])
    assert "linear" in report and ("lowest_embedding_std" in report) != supervised
    encoder = torch.jit.load(tmp_path / "run" / "encoder.pt")
    assert encoder.activations(torch.rand(2, 3, 32, 32))[-1].shape == (2, 4 if supervised else 16)
    for r in rows_of(tmp_path / "run", "metrics.csv") if not supervised else ():
        assert r["loss"] == pytest.approx(r["invariance"] + r["regularisation"], rel=1e-5)


def test_layer_auto_reads_the_run_that_init_names(few, straight, tmp_path, capsys):
    """--layer auto --init RUN starts from its weights and takes a layer of its CKA map."""
    a, net, split, *_ = build(few, "--layer", "auto", "--init", straight)
    net.load_state_dict(model_of(straight))
    expected = V.auto_layer(net, split, a, CPU)
    report = quick(*flags(few, "--layer", "auto", "--init", straight, "--epochs", 1, "--out", tmp_path / "run"))
    assert report["layers_augmented"] == [expected] and f"so layer {expected}" in capsys.readouterr().out
    for layer in ("stem", "block1"):                                 # epoch 0 is the network that --init gave
        ours, theirs = (by_key(p)[e, layer, "class"] for p, e in ((tmp_path / "run", 0), (straight, 3)))
        assert ours["cdnv"] == theirs["cdnv"] and ours["ncc_test"] == theirs["ncc_test"]


def test_seeds_give_mean_and_deviation_over_run_folders(few, tmp_path):
    table = quick(*flags(few, "--seeds", 0, 1, "--epochs", 1, "--out", tmp_path / "run"))
    reports = [report_of(tmp_path / "run" / f"s{seed}") for seed in (0, 1)]
    assert not same_bits(*(model_of(tmp_path / "run" / f"s{seed}") for seed in (0, 1)))
    for key in ("linear", "knn", "linear_untrained", "ncc_test_class", "cdnv_class"):
        values = [r[key] for r in reports]
        assert table[key] == pytest.approx((statistics.mean(values), statistics.stdev(values)))


def test_pool_flatten_probes_every_element_of_a_map(few, tmp_path, monkeypatch):
    """512 = 8 channels x 8 x 8 places instead of 8; --probe-layers chooses and --probe-images limits."""
    widths, measure = set(), V.Probes.measure

    def spy(self, x, y, x_test, *more):
        widths.add((x.shape, x_test.shape))
        return measure(self, x, y, x_test, *more)
    monkeypatch.setattr(V.Probes, "measure", spy)
    quick(*flags(few, "--pool", "flatten", "--probe-layers", "block1", "--probe-images", 100, "--epochs", 1,
                 "--out", tmp_path / "run"))
    assert widths == {((100, 512), (24, 512))}
    assert {r["layer"] for r in rows_of(tmp_path / "run")} == {"block1"}


def test_features_taken_group_by_group_are_the_same(done, few, tmp_path, monkeypatch):
    """When not all layers fit at once the network runs once a group; no number changes."""
    monkeypatch.setattr(V.Probes, "groups", lambda self, activations, names: [[n] for n in names])
    quick("--encoder", done / "encoder.pt", *EVERYTHING, "--probes", "ncc", "--probe-layers", "stem", "block1",
          "--out", tmp_path / "probes")
    ours, theirs = by_key(tmp_path / "probes"), by_key(done)
    assert len(ours) == 12
    for (_, layer, target), row in ours.items():
        for measure in ("ncc_train", "ncc_test", "cdnv", "variance", "distance"):
            assert row[measure] == pytest.approx(theirs[3, layer, target][measure], rel=1e-3, abs=0.8)


def test_pictures_of_several_sizes_are_streamed_to_every_probe(few, tmp_path, capsys):
    """Sample level, random targets, classes, MINE; one broken picture is named once, skipped and counted."""
    for i, f in enumerate(sorted(few.rglob("*.png"))[::3]):
        (tmp_path / "mixed" / f.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(f).resize((32 + i % 3, 40)).save(tmp_path / "mixed" / f.parent.name / f.name)
    broken = tmp_path / "mixed" / "class1" / "03.png"
    assert broken.exists()
    broken.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    report = quick(*flags(tmp_path / "mixed", *EVERYTHING, "--probe-epochs", 0, "--epochs", 1, "--image-size", 32,
                          "--batch-size", 24, "--layer", 1, "--out", tmp_path / "run"))
    table, text = by_key(tmp_path / "run"), capsys.readouterr().out
    assert {t for _, _, t in table} == {"sample", "class", "random 1.00", "random 0.50", "random 0.00"}
    assert report["broken_pictures"] == 1 and text.count("03.png") == 1
    assert all(math.isfinite(v) for k, v in report.items() if isinstance(v, float)) and report["steps"] == 3


def test_without_labels_the_sample_level_alone_is_probed(few, tmp_path):
    """Pictures without class folders: the run ends well, with figures."""
    (tmp_path / "flat").mkdir()
    for i, f in enumerate(sorted(few.rglob("*.png"))[::4]):
        shutil.copy(f, tmp_path / "flat" / f"{i:03}.png")
    report = V.main(flags(tmp_path / "flat", "--sample-level", 5, 4, 2, "--target-net", "auto", "--mine-steps", 5,
                          "--probes", "svm", "ncc", "--epochs", 1, "--out", tmp_path / "run"))
    assert {r["target"] for r in rows_of(tmp_path / "run")} == {"sample"} and "svm_sample" in report
    assert "linear" not in report and "information_bits" in report
    assert not (tmp_path / "run" / "targets.npz").exists() and (tmp_path / "run" / "encoder.pt").exists()
    assert_drawn(tmp_path / "run" / "figures.png")
    assert_drawn(tmp_path / "run" / "clusters.png", 5)


def test_an_older_run_moves_aside(few, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "note.txt").write_text("older")
    quick(*flags(few, "--epochs", 1, "--out", out))
    assert (tmp_path / "run.1" / "note.txt").read_text() == "older" and not (out / "note.txt").exists()


def test_run_name_says_what_differs_from_the_defaults():
    assert V.settings([]).name == "vicreg_probe-shapes"
    words = ["--arch", "RES-1-8", "--dataset", "cifar10", "--no-stop-grad", "--sample-level", "5", "4", "3"]
    assert V.settings(words).name == "vicreg_probe-cifar10-stopgradFalse-archRES-1-8-samplelevel5_4_3"
    assert V.settings(["--device", "cpu", "--seed", "4", "--workers", "3"]).name == "vicreg_probe-shapes"


def test_preset_paper_sets_the_papers_values_and_flags_win():
    a = V.settings(["--preset", "paper"])
    assert (a.dataset, a.arch, a.batch_size, a.epochs, a.lr) == ("cifar100", "RES-5-250", 256, 1000, 0.002)
    assert a.weight_decay == 1e-6 and a.sample_level == [500, 100, 20] and a.target_net == "resnet18"
    assert a.probe_epochs == [0, 20, 40, 100, 400, 1000]
    a = V.settings(["--preset", "paper", "--epochs", "30", "--dataset", "cifar10"])
    assert (a.dataset, a.arch, a.probe_epochs) == ("cifar10", "RES-5-250", [0, 20, 30])


# --- any encoder ------------------------------------------------------------------------------------------------------

def test_encoder_probes_its_own_export_to_the_numbers_of_the_run(done, tmp_path):
    """All layers, on the data set that the file names; stem and block1 as the run itself measured after training."""
    report = quick("--encoder", done / "encoder.pt", *EVERYTHING, "--workers", 0, "--out", tmp_path / "probes")
    ours, theirs = by_key(tmp_path / "probes"), by_key(done)
    assert {layer for _, layer, _ in ours} == {"stem", "block1.odd", "block1", "avgpool", "head"} and len(ours) == 30
    for (_, layer, target), row in ours.items():
        if layer in ("stem", "block1", "avgpool"):
            expected = theirs[3, layer.replace("avgpool", "block1"), target]    # deviation 1: its average
            for measure in ("svm", "ncc_train", "ncc_test", "cdnv", "variance", "distance"):
                assert row[measure] == pytest.approx(expected[measure], rel=1e-3, abs=0.8), (layer, target, measure)
    assert report["linear"] == pytest.approx(report_of(done)["linear"], abs=0.8)
    assert report["knn"] == pytest.approx(report_of(done)["knn"], abs=0.8)
    assert json.loads((tmp_path / "probes" / "config.json").read_text())["representation"] == "avgpool"
    assert "checkpoint.pt" not in {p.name for p in (tmp_path / "probes").iterdir()}


def test_encoder_of_simclr_is_probed_with_nothing_else_given(few, tmp_path):
    """Data set, its folder and size come from the file; the results lie beside it."""
    S.main(["--dataset", "folder", "--data-dir", str(few), "--workers", "0", "--batch-size", "36", "--epochs", "1",
            "--device", "cpu", "--layer", "4", "--out", str(tmp_path / "run")])
    report = quick("--encoder", tmp_path / "run" / "encoder.pt", "--workers", 0, "--device", "cpu", "--sample-level", 4,
                   3, 2, "--target-net", "none", "--mine-steps", 5, "--probes", "svm", "ncc")
    assert {"linear", "knn", "svm_class", "svm_sample", "information_bits"} <= report.keys()
    # 24 pictures, and not the same ones until vicreg_probe.py holds out a tenth of each class, too
    assert report["linear"] == pytest.approx(report_of(tmp_path / "run")["linear"], abs=25)
    config = json.loads((tmp_path / "run" / "probes" / "config.json").read_text())
    assert config["representation"] == "avgpool" and config["data_dir"] == str(few)
    layers = [n.removesuffix(".even") for n in config["encoder_config"]["layers"]]
    assert {r["layer"] for r in rows_of(tmp_path / "run" / "probes")} == set(layers) and len(layers) > 5


# --- interrupted and resumed ------------------------------------------------------------------------------------------

def resumable(few, *more):
    """18 steps with dropout and blur, everything probed after every epoch."""
    return flags(few, *EVERYTHING, "--probes", "svm", "ncc", "--epochs", 3, "--layer", 1, "--blur", 0.5, *more)


@pytest.fixture(scope="module")
def straight(few, tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("straight") / "run"
    quick(*resumable(few, "--out", out))
    return out


def assert_same_run(out, straight):
    """Weights, optimizer and position bit for bit; every table and measurement."""
    ours, theirs = load(out), load(straight)
    for part in ("model", "optimizer", "step"):
        assert same_bits(ours[part], theirs[part]), part
    assert rows_of(out) == rows_of(straight) and rows_of(out, "information.csv") == rows_of(straight, "information.csv")
    apart = ("seconds", "images_per_second", "run", "loss", "lowest_embedding_std")    # the last two: of logged steps
    ours, theirs = ({k: v for k, v in report_of(p).items() if k not in apart} for p in (out, straight))
    assert ours == theirs
    for name in ("clusters.npz", "targets.npz"):
        with np.load(Path(out) / name) as f, np.load(straight / name) as g:
            assert f.keys() == g.keys() and all((f[k] == g[k]).all() for k in f)


def at_call(patch, owner, name, call, do):
    """do() when the function `name` of `owner` is called for the call-th time; returns the list that counts calls."""
    calls, function = [0], getattr(owner, name)

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            do()
        return function(*args, **kwargs)
    patch.setattr(owner, name, wrapped)
    return calls


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


# of clustering: an epoch has 2 layers x 2 levels, and 3 random targets at one layer: 7; after training 10: 31 in all
@pytest.mark.parametrize("name, call, step, probed", [
    ("random_targets", 1, None, 0), ("clustering", 1, None, 0),      # before the first step: nothing to keep
    ("train_views", 9, 9, 2),                                        # in a step
    ("train_views", 6, 6, 1),                                        # in the last step of an epoch that is to be probed
    ("clustering", 7 + 3, 6, 1), ("clustering", 25, 18, 3),          # in a probe between epochs, in the last one,
    ("mutual_information", 4, 18, 4), ("export", 1, 18, 4)])         # at its very end, after it
def test_stopped_anywhere_and_resumed_reaches_the_same_bits_and_probes(few, straight, tmp_path, monkeypatch, capsys,
                                                                       name, call, step, probed):
    """SIGTERM ends with 143 and the command that goes on; that ends as the uninterrupted run did, and no epoch is
    probed twice."""
    words = resumable(few, "--out", tmp_path / "a run", "--save-every", 1e9)
    with monkeypatch.context() as patch:
        at_call(patch, V, name, call, sigterm)
        with pytest.raises(SystemExit) as end:
            quick(*words)
    assert end.value.code == 143
    last = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert last[0] == "python" and last[1].endswith("vicreg_probe.py") and last[2:] == [*words, "--resume"]
    if step is None:
        assert not (tmp_path / "a run" / "checkpoint.pt").exists()
    else:
        assert load(tmp_path / "a run")["step"] == step
        assert len({r["epoch"] for r in rows_of(tmp_path / "a run")}) == probed
    with monkeypatch.context() as patch:
        probes = at_call(patch, V.Probes, "run", 0, None)
        quick(*last[2:])
    assert probes[0] == 4 - probed
    assert_same_run(tmp_path / "a run", straight)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_broken_by_an_error_inside_a_probe_resumes_to_the_same_bits(few, straight, tmp_path, monkeypatch):
    """An exception (memory, say) in the third probe: the epoch's checkpoint was written before it."""
    words = resumable(few, "--out", tmp_path / "run", "--save-every", 1e9)

    def breaks():
        raise MemoryError
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        at_call(patch, V, "fit_svm", 7 + 7 + 2, breaks)
        quick(*words)
    assert load(tmp_path / "run")["step"] == 12
    quick(*words, "--resume")
    assert_same_run(tmp_path / "run", straight)


def test_resume_without_a_checkpoint_takes_nothing_from_the_folder(few, straight, tmp_path):
    """Killed before the first checkpoint, then other flags: the probes and targets of the old ones do not stay."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("probes.csv", "information.csv", "targets.npz"):
        shutil.copy(straight / name, out / name)
    words = flags(few, *EVERYTHING, "--seed", 1, "--epochs", 1)
    quick(*words, "--out", out, "--resume")
    quick(*words, "--out", tmp_path / "fresh")
    assert rows_of(out) == rows_of(tmp_path / "fresh")


def test_a_finished_run_may_be_resumed(few, straight, tmp_path, monkeypatch):
    """Nothing is left to train or to probe: report and export are made again."""
    out = shutil.copytree(straight, tmp_path / "run")
    (out / "report.json").unlink()
    (out / "encoder.pt").unlink()
    probes = at_call(monkeypatch, V.Probes, "run", 0, None)
    quick(*resumable(few, "--out", out, "--resume"))
    assert probes[0] == 0 and (out / "encoder.pt").exists()
    assert_same_run(out, straight)


def test_the_printed_command_goes_on_in_a_real_process(few, straight, tmp_path):
    """SIGTERM between steps (after the first checkpoint): 143; the last line, run as it stands, ends as `straight`."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out, script = tmp_path / "a run", os.path.relpath(ROOT / "vicreg_probe.py", tmp_path)
    log = open(tmp_path / "log.txt", "w+")
    child = subprocess.Popen([sys.executable, script, *resumable(few, "--save-every", 0), "--out", out], cwd=tmp_path,
                             stdout=log, stderr=subprocess.STDOUT, env=env)
    deadline = time.time() + 120
    while not (out / "checkpoint.pt").exists() and child.poll() is None and time.time() < deadline:
        time.sleep(0.001)
    child.terminate()
    code = child.wait(60)
    log.seek(0)
    text = log.read()
    assert code == 143 and "Traceback" not in text, text
    assert 0 < load(out)["step"] < 18
    last = text.splitlines()[-1]
    done = subprocess.run(shlex.split(last), cwd=tmp_path, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and "arning" not in done.stderr, done.stderr
    assert_same_run(out, straight)
    assert_drawn(out / "figures.png")


# --- two processes ----------------------------------------------------------------------------------------------------

WORLD, B = 2, 6                                                      # processes, pictures in each


def network(seed=0):
    """The script's network, its BatchNorm in eval mode: whole-batch statistics need SyncBatchNorm, so CUDA."""
    a = V.settings(flags("shapes", "--layer", 1, "--rate", 0.4, "--seed", seed))
    net = V.build(a, 32, list(range(20)), CPU).train()
    for m in net.modules():
        if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            m.eval()
    return a, net


def forward(net, rank):
    g = torch.Generator().manual_seed(10 + rank)
    views, rows = torch.rand(2 * B, 3, 32, 32, generator=g), torch.rand(2 * B, generator=g) < 0.5
    torch.manual_seed(20 + rank)                                     # the same dropout masks wherever it runs
    return net(views, rows)                                          # [2B, 16]


def worker(rank, folder):
    """One of the processes: the loss, its parts and gradients of this process's pictures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        a, net = network(seed=rank)                                  # DistributedDataParallel sends rank 0's weights
        model = torch.nn.parallel.DistributedDataParallel(net)       # kept: without it backward would not average
        losses = V.losses_of(a, forward(model, rank), None)
        losses["loss"].backward()
        torch.save(({k: v.detach() for k, v in losses.items()}, {k: p.grad for k, p in net.named_parameters()}),
                   f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def slow_vicreg(z1, z2):
    """Eq. 1 dimension by dimension, in double precision: the weighted parts of 25, 25, 1."""
    invariance, regularisation, d = ((z1 - z2) ** 2).mean(), 0, z1.shape[1]
    for z in (z1, z2):
        cov = torch.cov(z.T)
        for i in range(d):
            regularisation = regularisation + 25 * torch.relu(1 - (cov[i, i] + 1e-4).sqrt()) / d / 2
            regularisation = regularisation + sum(cov[i, j] ** 2 for j in range(d) if j != i) / d
    return {"invariance": 25 * invariance, "regularisation": regularisation}


def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path):
    """The mean loss over processes and DDP's averaged gradients equal one process's on the whole batch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vicreg_probe"])
    children = [context.Process(target=worker, args=(rank, str(tmp_path))) for rank in range(WORLD)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    _, net = network()
    halves = [forward(net, rank).double().chunk(2) for rank in range(WORLD)]
    parts = slow_vicreg(torch.cat([h[0] for h in halves]), torch.cat([h[1] for h in halves]))
    sum(parts.values()).backward()
    for k, value in {**parts, "loss": sum(parts.values())}.items():
        assert statistics.mean(r[0][k].item() for r in results) == pytest.approx(value.item(), rel=1e-5), k
    for k, p in net.named_parameters():
        assert p.grad.abs().max() > 0, k
        for r in results:
            torch.testing.assert_close(r[1][k], p.grad, atol=1e-5, rtol=1e-4, msg=lambda m, k=k: f"{k}: {m}")


def test_torchrun_trains_and_the_first_process_probes_and_writes(few, tmp_path):
    """Real torchrun: it ends well, one folder with every probe once, the batch is shared, the encoder loads."""
    words = flags(few, *EVERYTHING, "--batch-size", 32, "--epochs", 1, "--out", "run")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           V.__file__, *words], cwd=tmp_path, text=True, capture_output=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run"]           # no second run moved the first one aside
    assert done.stdout.count("steps an epoch") == 1 and done.stdout.count("encoder.pt") == 1
    report, table = report_of(tmp_path / "run"), by_key(tmp_path / "run")
    assert report["steps"] == 216 // 32 and "linear" in report and len(table) == 7 + 10
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    assert torch.jit.load(tmp_path / "run" / "encoder.pt")(torch.rand(3, 3, 32, 32)).shape == (3, 8)
