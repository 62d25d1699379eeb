"""Bad input gets one line on stderr that says what is wrong and what to do, exit code 2, and no run folder."""
import shutil

import pytest
import torch
from conftest import Trap

import simclr_deepaug as S

SCRIPT = S
FOLDER = ["--dataset", "folder", "--data-dir", "few", "--workers", "0", "--device", "cpu", "--epochs", "1",
          "--batch-size", "32"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, few):
    """Every test works in an empty folder that holds a link `few` to the drawn pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").symlink_to(few)


@pytest.mark.parametrize("words, says", [
    ("--layer 9", ["--layer 9", "-1 input", "4 layer4", "6 head", "auto"]),
    ("--layer -2", ["--layer -2", "6 head"]),
    ("--layer 1.5", ["--layer 1.5", "6 head"]),
    ("--layer layer4", ["--layer layer4", "4 layer4"]),
    ("--layer 4 none", ["--layer 4 none"]),
    ("--rate 1", ["--rate", "[0, 1)"]),
    ("--rate -0.1", ["--rate", "[0, 1)"]),
    ("--rate nan", ["--rate", "[0, 1)"]),
    ("--rate half", ["--rate", "half"]),
    ("--sample 0", ["--sample", "(0, 1]"]),
    ("--sample 1.01", ["--sample", "(0, 1]"]),
    ("--sample nan", ["--sample"]),
    ("--components 0", ["--components"]),
    ("--components -3", ["--components"]),
    ("--transform mixup", ["--transform", "channel"]),
    ("--pairs cross --sample 1", ["--pairs", "--sample"]),
    ("--freeze before --layer none", ["--freeze", "--layer"]),
    ("--freeze before --layer 6", ["--layer 6", "nothing"]),
    ("--freeze after --layer -1", ["--layer -1", "nothing"]),
    ("--layer 6 --sample 1", ["nothing"]),
    ("--layer auto", ["--layer auto", "--init", "--layer none"]),
    ("--batch-size 1", ["--batch-size"]),
    ("--batch-size 217", ["--batch-size", "217", "216"]),
    ("--epochs 0", ["--epochs"]),
    ("--epochs -1", ["--epochs"]),
    ("--epochs many", ["--epochs", "many"]),
    ("--warmup-epochs -1", ["--warmup-epochs"]),
    ("--workers -1", ["--workers"]),
    ("--image-size -5", ["--image-size"]),
    ("--lr 0", ["--lr"]),
    ("--lr nan", ["--lr"]),
    ("--lr inf", ["--lr"]),
    ("--temperature 0", ["--temperature"]),
    ("--weight-decay -1", ["--weight-decay"]),
    ("--weight-decay nan", ["--weight-decay"]),
    ("--crop-min 0", ["--crop-min"]),
    ("--blur 1.5", ["--blur"]),
    ("--solarize -1", ["--solarize"]),
    ("--log-every 0", ["--log-every"]),
    ("--save-every nan", ["--save-every"]),
    ("--probe-every -1", ["--probe-every"]),
    ("--seed 99999999999999999999", ["--seed"]),
    ("--seeds 0 0", ["--seeds"]),
    ("--seeds", ["--seeds"]),
    ("--learning-speed 3", ["--learning-speed", "--help"]),
    ("--transfer cifar10", ["cifar10", "--download"]),           # told before training, not after it
    ("--compare nowhere", ["--compare"]),
])
def test_refused_flags(refused, words, says):
    line = refused([*FOLDER, *words.split()])
    for part in says:
        assert part in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_absent(refused):
    line = refused(["--device", "cuda"])
    assert "--device cuda" in line and "--device cpu" in line


def test_compile_without_a_compiler(refused, monkeypatch):
    """torch.compile on the CPU needs a C++ compiler: without one a line says so, no page of traceback."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "--compile" in refused([*FOLDER, "--compile"])


def test_folder_missing_empty_or_without_train(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no picture")
    (tmp_path / "half" / "test").mkdir(parents=True)
    for name, part in (("nowhere", "no such folder"), ("empty", "no pictures"), ("text", "no pictures"),
                       ("half", "no pictures")):
        line = refused(["--dataset", "folder", "--data-dir", name])
        assert part in line and name in line


def test_folder_of_broken_pictures(refused, tmp_path):
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\nnot much more")
    assert "can be read" in refused(["--dataset", "folder", "--data-dir", "broken"])


def test_cifar_missing_and_damaged(refused, tmp_path):
    """A missing or truncated copy gets a line that names --download."""
    assert "--download" in refused(["--dataset", "cifar10"])
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python" / name).write_bytes(b"\x80\x04half of a file")
    line = refused(["--dataset", "cifar100", "--data-dir", tmp_path])
    assert "--download" in line and "cifar100" in line


def test_supervised_without_labels(refused, tmp_path, few):
    (tmp_path / "flat").mkdir()
    for i, picture in enumerate(sorted(few.rglob("*.png"))[::8]):
        shutil.copy(picture, tmp_path / "flat" / f"{i}.png")
    line = refused(["--dataset", "folder", "--data-dir", "flat", "--workers", 0, "--objective", "supervised",
                            "--batch-size", 8])
    assert "--objective supervised" in line and "folder" in line


def checkpoint(path, **changes):
    """A checkpoint as a run writes it, of the small network for these pictures."""
    a = S.settings(FOLDER)
    train, _, classes = S.load_data("folder", a, "cpu")
    net = S.build(a, train, classes, "cpu")
    torch.save({"script": S.NAME, "config": S.config_of(a), "data": len(train), "model": net.state_dict(), "step": 0,
                "optimizer": {}, "metrics": [], "seconds": 0.0, **changes}, path)


def test_init_missing_corrupt_foreign_or_of_other_sizes(refused, tmp_path):
    checkpoint(tmp_path / "good.pt")
    checkpoint(tmp_path / "other.pt", script="vicreg_probe")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"script": S.NAME}, tmp_path / "bare.pt")
    (tmp_path / "run").mkdir()
    words = [*FOLDER, "--init"]
    for name, flags, part in (("nowhere", [], "no checkpoint"), ("run", [], "no checkpoint"),
                              ("cut.pt", [], "damaged"), ("text.pt", [], "damaged"), ("list.pt", [], "damaged"),
                              ("bare.pt", [], "damaged"), ("other.pt", [], "vicreg_probe"),
                              ("good.pt", ["--arch", "resnet18"], "--arch"), ("good.pt", ["--head-layers", 3], "--"),
                              ("good.pt", ["--objective", "supervised"], "--")):
        line = refused([*words, name, *flags])
        assert part in line and name.removesuffix(".pt") in line


def test_init_runs_no_code_of_the_file(refused, tmp_path):
    """Files are loaded with weights_only: a pickle that would run code is refused and its code does not run."""
    torch.save({"script": S.NAME, "model": Trap()}, tmp_path / "trap.pt")
    assert "damaged" in refused([*FOLDER, "--init", "trap.pt"])
    assert not (tmp_path / "sprung").exists()


def test_as_a_user_runs_it(cli):
    """The same through a real process: code 2, one line, nothing on stdout, no traceback."""
    done = cli("simclr_deepaug.py", "--rate", "1")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
