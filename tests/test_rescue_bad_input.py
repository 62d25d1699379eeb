"""topk_rescue.py: bad input gets one line on stderr that says what is wrong, exit code 2, and nothing written."""
import shutil

import pytest
import torch
from conftest import Trap

import topk_rescue as R

SCRIPT = R
FOLDER = ["--dataset", "folder", "--data-dir", "tiny", "--image-size", "32", "--workers", "0", "--device", "cpu",
          "--epochs", "1", "--batch-size", "32", "--projector", "32", "16", "--prototypes", "32", "--local-crops", "2"]
VIT = "--method dinov2"


@pytest.fixture(scope="module")
def tiny(few, tmp_path_factory):
    """Every sixth of the drawn pictures: 36 to train on, 4 to test on; loaded sooner than `few`."""
    root = tmp_path_factory.mktemp("tiny")
    for picture in sorted(few.rglob("*.png"))[::6]:
        (root / picture.parent.name).mkdir(exist_ok=True)
        shutil.copy(picture, root / picture.parent.name)
    return root


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, tiny):
    """Every test works in an empty folder that holds a link `tiny` to the pictures; training fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "tiny").symlink_to(tiny)

    def work(*args, **kwargs):
        raise AssertionError("long work has begun")
    for name in ("common_view", "encode", "draw_shapes"):
        monkeypatch.setattr(R, name, work)


@pytest.mark.parametrize("words, says", [
    ("--k 33", ["--k 33", "32"]),
    ("--k -1", ["--k -1"]),
    ("--k 1.5", ["--k", "1.5"]),
    ("--s -0.1", ["--s -0.1", "negative"]),
    ("--s nan", ["--s nan"]),
    ("--s inf", ["--s inf"]),
    ("--rescue easiest", ["--rescue", "hardest"]),
    ("--strong mixup", ["--strong", "deepaug"]),
    ("--strong deepaug --layer none", ["--strong deepaug", "--layer"]),
    ("--layer 9", ["--layer 9", "small", "-1 input", "0 stem", "4 layer4", "6 head", "auto"]),
    ("--layer -2", ["--layer -2", "6 head"]),
    ("--layer 1.5", ["--layer 1.5"]),
    ("--layer layer4", ["--layer layer4", "4 layer4"]),
    ("--layer 4 none", ["--layer 4 none"]),
    (f"{VIT} --layer 7", ["--layer 7", "vit-tiny", "0 embed", "4 block4", "5 cls", "6 head", "auto"]),
    (f"{VIT} --layer stem", ["--layer stem", "1 block1"]),
    (f"{VIT} --arch vit-s --layer 15", ["--layer 15", "12 block12", "14 head"]),
    ("--layer auto", ["--layer auto", "--init"]),
    ("--rate 1", ["--rate", "[0, 1)"]),
    ("--rate -0.1", ["--rate"]),
    ("--rate nan", ["--rate"]),
    ("--sample 0", ["--sample", "(0, 1]"]),
    ("--sample 1.01", ["--sample"]),
    ("--components 0", ["--components"]),
    ("--transform mixup", ["--transform", "channel"]),
    ("--method dinov2 --arch small", ["dinov2", "ViT", "vit-tiny"]),
    ("--method dinov2 --arch resnet50", ["dinov2", "ViT"]),
    ("--method byol", ["--method", "mocov3"]),
    ("--arch vit-huge", ["--arch", "vit-l"]),
    (f"{VIT} --patch 5", ["--patch 5", "32"]),
    (f"{VIT} --patch 64", ["--patch 64", "32"]),
    (f"{VIT} --image-size 36", ["--patch 8", "36"]),
    ("--method mocov3 --arch vit-tiny --patch 5", ["--patch 5", "32"]),
    (f"{VIT} --local-size 12", ["--patch 8", "12"]),
    (f"{VIT} --local-size 40", ["--local-size 40", "32"]),
    (f"{VIT} --local-size -8", ["--local-size"]),
    (f"{VIT} --local-crops -1", ["--local-crops"]),
    (f"{VIT} --patch -4", ["--patch"]),
    (f"{VIT} --prototypes 1", ["--prototypes"]),
    (f"{VIT} --centering mean", ["--centering", "sinkhorn"]),
    (f"{VIT} --drop-path 1", ["--drop-path"]),
    (f"{VIT} --layer-scale 0", ["--layer-scale"]),
    ("--projector 0 16", ["--projector"]),
    ("--projector 16", ["--projector"]),
    ("--momentum 1.5", ["--momentum"]),
    ("--momentum nan", ["--momentum"]),
    ("--temperature 0", ["--temperature"]),
    ("--batch-size 1", ["--batch-size"]),
    ("--batch-size 37 --no-baseline", ["--batch-size 37", "36"]),
    ("--batch-size 37", ["--batch-size 37", "36"]),
    ("--epochs 0", ["--epochs"]),
    ("--lr 0", ["--lr"]),
    ("--lr nan", ["--lr"]),
    ("--weight-decay -1", ["--weight-decay"]),
    ("--weight-decay nan", ["--weight-decay"]),
    ("--crop-min 0", ["--crop-min"]),
    ("--blur 1.5", ["--blur"]),
    ("--blur 0.1 0.2 0.3 0.4", ["--blur"]),
    ("--solarize -1", ["--solarize"]),
    ("--jitter 0.4 0.4 0.4 0.6", ["--jitter"]),
    ("--jitter 0.4 0.4", ["--jitter"]),
    ("--warmup-epochs -1", ["--warmup-epochs"]),
    ("--image-size -5", ["--image-size"]),
    ("--workers -1", ["--workers"]),
    ("--probe-every -1", ["--probe-every"]),
    ("--log-every 0", ["--log-every"]),
    ("--save-every nan", ["--save-every"]),
    ("--seed -1", ["--seed"]),
    ("--seeds 0 0", ["--seeds"]),
    ("--seeds", ["--seeds"]),
    ("--sweep rate 0.1", ["--sweep", "k or s"]),
    ("--sweep k", ["--sweep"]),
    ("--sweep", ["--sweep"]),
    ("--sweep k 2 many", ["--sweep k many"]),
    ("--sweep k 1.5", ["--sweep k 1.5"]),
    ("--sweep k 2 33", ["--sweep k 33"]),
    ("--sweep k -1", ["--sweep k -1"]),
    ("--sweep s 1 nan", ["--sweep s nan"]),
    ("--sweep s -1", ["--sweep s -1"]),
    ("--sweep s inf", ["--sweep s inf"]),
    ("--sweep k 2 --rescue all", ["--sweep", "--rescue"]),
    ("--sweep s 1 --rescue none", ["--sweep", "--rescue"]),
    ("--learning-speed 3", ["--learning-speed", "--help"]),
    ("--preset huge", ["--preset", "cifar"]),
    ("--transfer imagenet", ["--transfer", "voc2007"]),
    ("--compare nowhere", ["--compare"]),
    ("--init nowhere", ["no checkpoint", "nowhere"]),
    ("--data-dir nowhere", ["nowhere", "no such folder"]),
    ("--dataset cifar100 --data-dir .", ["cifar100", "--download"]),
])
def test_refused_flags(refused, words, says):
    line = refused([*FOLDER, *words.split()])
    for part in says:
        assert part in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_absent(refused):
    line = refused(["--device", "cuda"])
    assert "--device cuda" in line and "--device cpu" in line


def test_local_crops_are_not_deterministic_on_cuda(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "--local-crops 0" in refused([*FOLDER, *VIT.split(), "--device", "auto", "--deterministic"])
    R.settings([*VIT.split(), "--deterministic", "--local-crops", "0"])
    R.settings([*VIT.split(), "--deterministic", "--device", "cpu"])


@pytest.mark.parametrize("words, says", [
    ("", "--no-baseline"),
    ("--no-baseline --k 3", "--k 3"),
    ("--no-baseline --k 2 --batch-size 33", "--batch-size 33"),
    ("--no-baseline --k 2 --seeds 0 1", "--seeds"),
    ("--no-baseline --k 2 --sweep k 2 4", "--sweep"),
    ("--no-baseline --k 2 --download", "--download"),
])
def test_what_several_processes_cannot_do(refused, monkeypatch, words, says):
    monkeypatch.setenv("WORLD_SIZE", "2")                            # as torchrun sets it
    assert says in refused([*FOLDER, *words.split()])


@pytest.mark.parametrize("rescue", ["none", "all"])
def test_k_that_is_not_used_need_not_suit_the_processes(monkeypatch, rescue):
    """The default k of a small batch is 1: `torchrun ... --rescue none` must work with it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AssertionError, match="long work"):
        R.main([*FOLDER, "--no-baseline", "--rescue", rescue])


@pytest.mark.parametrize("words", [
    "--k 0", "--k 32 --s 0 --layer 6", "--sweep k 0 32", "--transfer flowers102 sun397",
    f"{VIT} --patch 4 --layer 6 --local-size 32", f"{VIT} --local-crops 0"])
def test_the_ends_of_the_ranges_are_not_refused(words):
    """The counterpart of the tests above: these get as far as the work."""
    with pytest.raises(AssertionError, match="long work"):
        R.main([*FOLDER, *words.split()])


# --- pictures ---------------------------------------------------------------------------------------------------------

def test_folder_empty_or_of_broken_pictures(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\nnot much more")
    assert "no pictures" in refused([*FOLDER, "--data-dir", "empty"])
    assert "can be read" in refused([*FOLDER, "--data-dir", "broken"])


def test_a_broken_picture_is_no_reason_to_stop(capsys, tmp_path, tiny):
    """The refusals above are for what cannot work: a picture that cannot be read beside others is skipped."""
    shutil.copytree(tiny, tmp_path / "mixed")
    (tmp_path / "mixed" / "class0" / "06.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(AssertionError, match="long work"):
        R.main([*FOLDER, "--data-dir", "mixed", "--out", "run"])
    assert "06.png" in capsys.readouterr().out


# --- checkpoints ------------------------------------------------------------------------------------------------------

PLAIN = [*FOLDER, "--no-baseline"]


@pytest.fixture
def state(tmp_path):
    """A checkpoint as a run writes it, in run/checkpoint.pt, of the small network for these pictures."""
    a = R.settings(PLAIN)
    method = R.SimCLR(a, R.Net(a, 32, torch.zeros(3), torch.ones(3)))
    content = {"script": R.NAME, "config": R.config_of(a), "data": 36, "model": method.state_dict(), "step": 0,
               "optimizer": {}, "metrics": [], "seconds": 0.0, "rescued": torch.zeros(36, dtype=torch.long),
               "histograms": []}
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    return content


@pytest.mark.parametrize("change", [
    "--k 3", "--s 2", "--rescue random", "--strong deepaug", "--layer 1", "--lr 0.037", "--batch-size 30", "--seed 5",
    "--epochs 20", "--no-stop-grad", "--arch resnet18", "--jitter 0.1 0.1 0.1 0.1", "--blur 0.5", "--method mocov3",
    "--data-dir tiny/class0"])
def test_resume_with_other_flags_is_refused_naming_them(refused, state, change):
    line = refused([*PLAIN, "--out", "run", "--resume", *change.split()])
    assert "other flags" in line and change.split()[0].replace("--no-", "--") in line


def test_resume_with_other_pictures_is_refused(refused, tmp_path, state):
    torch.save({**state, "data": 300}, tmp_path / "run" / "checkpoint.pt")
    line = refused([*PLAIN, "--out", "run", "--resume"])
    assert "300" in line and "36" in line


@pytest.mark.parametrize("words", ["--out run --resume", "--init run"])
def test_damaged_and_foreign_checkpoints_are_refused(refused, tmp_path, state, words):
    """Truncated, not a checkpoint, without its parts, of another script, or one whose pickle would run code."""
    file, words = tmp_path / "run" / "checkpoint.pt", [*PLAIN, *words.split()]
    whole = file.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:-100], b"", b"hello"):
        file.write_bytes(content)
        assert "damaged" in refused(words) and file.read_bytes() == content
    for content, says in [([1, 2], "damaged"), ({**state, "script": "simclr_deepaug"}, "simclr_deepaug"),
                          ({"script": R.NAME, "model": Trap()}, "damaged"),
                          *(({k: v for k, v in state.items() if k != part}, "damaged") for part in
                            ("config", "model", "optimizer", "step"))]:
        torch.save(content, file)
        assert says in refused(words)


@pytest.mark.parametrize("words", ["--arch resnet18", "--projector 16 8", "--method mocov3", "--method dinov2",
                                   "--arch vit-tiny"])
def test_init_of_other_sizes(refused, state, words):
    line = refused([*PLAIN, "--init", "run", *words.split()])
    assert "--init run" in line and "--method" in line
