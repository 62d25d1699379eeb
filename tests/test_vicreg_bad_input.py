"""vicreg_probe.py: bad input gets one line on stderr that says what is wrong, exit code 2, and nothing written."""
import json
import shutil

import pytest
import torch
from conftest import Trap

import vicreg_probe as V

SCRIPT = V
pytestmark = pytest.mark.filterwarnings("ignore:Encountering a list")
FOLDER = ["--dataset", "folder", "--data-dir", "few", "--workers", "0", "--device", "cpu", "--epochs", "1",
          "--batch-size", "36", "--arch", "RES-1-8", "--projector", "16", "16", "--sample-level", "0", "0", "0",
          "--target-net", "none", "--mine-steps", "0", "--probes", "ncc"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, few):
    """Every test works in an empty folder that holds a link `few` to the drawn pictures; training fails the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").symlink_to(few)

    def work(*args, **kwargs):
        raise AssertionError("long work has begun")
    for name in ("train_views", "random_targets", "layer_features", "draw_shapes"):
        monkeypatch.setattr(V, name, work)


@pytest.mark.parametrize("words, says", [
    ("--layer 9", ["--layer 9", "-1 input", "0 stem", "1 block1", "3 head", "auto"]),
    ("--layer -2", ["--layer -2", "3 head"]),
    ("--layer 1.5", ["--layer 1.5"]),
    ("--layer block1", ["--layer block1", "1 block1"]),
    ("--layer 1 none", ["--layer 1 none"]),
    ("--layer 4 --arch RES-1-8", ["--layer 4", "RES-1-8"]),
    ("--layer 12 --arch resnet18", ["--layer 12", "10 head"]),
    ("--layer auto", ["--layer auto", "--init"]),
    ("--arch RES-0-8", ["--arch RES-0-8", "RES-5-250"]),
    ("--arch RES-1-0", ["--arch"]),
    ("--arch RES-1", ["--arch"]),
    ("--arch res-1-8", ["--arch"]),
    ("--arch RES-1-8-9", ["--arch"]),
    ("--arch resnet50", ["--arch resnet50", "resnet18"]),
    ("--target-net RES-1", ["--target-net RES-1", "vit", "none"]),
    ("--target-net resnet50", ["--target-net"]),
    ("--target-net vit --image-size 30", ["--target-net vit", "30", "--image-size"]),
    ("--target-epochs 0", ["--target-epochs"]),
    ("--target-stages 1", ["--target-stages"]),
    ("--sample-level 1 5 5", ["--sample-level"]),
    ("--sample-level 5 1 5", ["--sample-level"]),
    ("--sample-level 5 5 0", ["--sample-level"]),
    ("--sample-level 0 5 5", ["--sample-level"]),
    ("--sample-level -3 5 5", ["--sample-level"]),
    ("--sample-level 5 5", ["--sample-level"]),
    ("--sample-level 217 2 1", ["--sample-level 217", "216"]),
    ("--probe-layers stem block9", ["--probe-layers block9", "stem", "block1", "head"]),
    ("--probe-layers block1.odd", ["--probe-layers block1.odd"]),
    ("--probe-epochs 0 -1", ["--probe-epochs"]),
    ("--probe-images -1", ["--probe-images"]),
    ("--probe-images 3", ["3 training pictures", "4 classes"]),
    ("--probe-images 6", ["class", "two of every class"]),
    ("--probe-images 9 --mine-steps 5", ["--mine-steps", "10"]),
    ("--probes tree", ["--probes", "logistic"]),
    ("--pool max", ["--pool", "flatten"]),
    # 216 pictures x 7000 views x 8 channels x 8 x 8 places x 4 bytes: 2.9 GiB of one layer, and cheap to refuse
    ("--pool flatten --sample-level 216 5000 2000", ["512 features", "GiB", "--pool avg", "--probe-images"]),
    ("--mine-steps -1", ["--mine-steps"]),
    ("--projector 0 16", ["--projector"]),
    ("--projector 16", ["--projector"]),
    ("--projector 16 -1", ["--projector"]),
    ("--rate 1", ["--rate", "[0, 1)"]),
    ("--rate -0.1", ["--rate", "[0, 1)"]),
    ("--rate nan", ["--rate"]),
    ("--sample 0", ["--sample", "(0, 1]"]),
    ("--sample 1.01", ["--sample", "(0, 1]"]),
    ("--components 0", ["--components"]),
    ("--invariance -1", ["--invariance"]),
    ("--variance -0.5", ["--variance"]),
    ("--covariance nan", ["--covariance"]),
    ("--covariance inf", ["--covariance"]),
    ("--temperature 0", ["--temperature"]),
    ("--objective byol", ["--objective", "supervised-autoaugment"]),
    ("--batch-size 1", ["--batch-size"]),
    ("--batch-size 217", ["--batch-size 217", "216"]),
    ("--epochs 0", ["--epochs"]),
    ("--lr 0", ["--lr"]),
    ("--lr nan", ["--lr"]),
    ("--weight-decay -1", ["--weight-decay"]),
    ("--crop-min 0", ["--crop-min"]),
    ("--blur 1.5", ["--blur"]),
    ("--solarize -1", ["--solarize"]),
    ("--warmup-epochs -1", ["--warmup-epochs"]),
    ("--image-size -5", ["--image-size"]),
    ("--log-every 0", ["--log-every"]),
    ("--save-every nan", ["--save-every"]),
    ("--seed -1", ["--seed"]),
    ("--seeds 0 0", ["--seeds"]),
    ("--learning-speed 3", ["--learning-speed", "--help"]),
    ("--data-dir nowhere", ["nowhere", "no such folder"]),
    ("--dataset cifar100 --data-dir .", ["cifar100", "--download"]),
    ("--init nowhere", ["no checkpoint", "nowhere"]),
    ("--encoder nowhere.pt", ["--encoder nowhere.pt", "no such file", "encoder.pt"]),
    ("--encoder .", ["--encoder ."]),
    ("--figures nowhere", ["--figures nowhere", "probes.csv"]),
])
def test_refused_flags(refused, words, says):
    line = refused([*FOLDER, *words.split()])
    for part in says:
        assert part in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_absent(refused):
    line = refused(["--device", "cuda"])
    assert "--device cuda" in line and "--device cpu" in line


@pytest.mark.parametrize("words, says", [("--seeds 0 1", "--seeds"), ("--batch-size 37", "--batch-size 37"),
                                         ("--encoder x.pt", "--encoder")])
def test_what_several_processes_cannot_do(refused, monkeypatch, words, says):
    monkeypatch.setenv("WORLD_SIZE", "2")                            # as torchrun sets it
    assert says in refused([*FOLDER, *words.split()])


# --- pictures ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, says", [
    ("--sample-level 5 2 1 --target-net RES-1-8", "--target-net"),
    ("--sample-level 5 2 1 --target-net vit", "--target-net"),
    ("--sample-level 5 2 1 --objective supervised", "--objective supervised"),
    ("--sample-level 5 2 1 --objective supervised-autoaugment", "--objective supervised-autoaugment"),
    ("--sample-level 0 0 0", "nothing to probe"),
])
def test_labels_missing_for_what_needs_them(refused, tmp_path, few, words, says):
    """Pictures without class folders."""
    (tmp_path / "flat").mkdir()
    for i, picture in enumerate(sorted(few.rglob("*.png"))[::5]):
        shutil.copy(picture, tmp_path / "flat" / f"{i}.png")
    line = refused([*FOLDER, "--data-dir", "flat", "--batch-size", 8, *words.split()])
    assert says in line and "class folders" in line


def test_a_class_with_one_picture(refused, tmp_path, few):
    for part in ("train", "test"):
        for name, pictures in (("many", 20), ("lonely", 1)):
            (tmp_path / "odd" / part / name).mkdir(parents=True)
            for i, picture in enumerate(sorted(few.rglob("*.png"))[:pictures]):
                shutil.copy(picture, tmp_path / "odd" / part / name / f"{i}.png")
    line = refused([*FOLDER, "--data-dir", "odd", "--batch-size", 8])
    assert "lonely has 1 of the 21" in line and "two of every class" in line


def test_folder_empty_or_of_broken_pictures(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\nnot much more")
    assert "no pictures" in refused([*FOLDER, "--data-dir", "empty"])
    assert "can be read" in refused([*FOLDER, "--data-dir", "broken"])


# --- --encoder --------------------------------------------------------------------------------------------------------

class Layers(torch.nn.Module):
    def forward(self, images):
        return images.mean((2, 3))

    def activations(self, images):
        return [images, images.mean((2, 3))]


def script(path, config, activations=True):
    """A TorchScript file; config: its config.json, or None for none."""
    example, extra = torch.rand(2, 3, 32, 32), {} if config is None else {"config.json": config}
    kinds = {"forward": example, **({"activations": example} if activations else {})}
    torch.jit.save(torch.jit.trace_module(Layers(), kinds), str(path), _extra_files=extra)


CONFIG = {"script": "vicreg_probe", "layers": ["stem", "avgpool"], "image_size": 32, "dataset": "folder",
          "classes": [], "flags": {"data_dir": "few"}}


def test_an_encoder_as_it_should_be_is_not_refused(tmp_path):
    """The counterpart of the tests below: the same file, whole, gets as far as the work."""
    script(tmp_path / "encoder.pt", json.dumps(CONFIG))
    with pytest.raises(AssertionError, match="long work"):
        V.main([*FOLDER, "--encoder", "encoder.pt"])


@pytest.mark.parametrize("config, activations, words, says", [
    (CONFIG, False, "", "no activations"),
    (None, True, "", "no config.json"),
    ({k: v for k, v in CONFIG.items() if k != "layers"}, True, "", "config.json"),
    ({"layers": ["stem", "avgpool"]}, True, "", "config.json"),      # of the user's own making
    ("not json", True, "", "encoder.pt"),
    ({**CONFIG, "script": "simcse_deepaug"}, True, "", "sentences"),
    (CONFIG, True, "--probe-layers stem block3", "stem, avgpool"),
    (CONFIG, True, "--sample-level 217 2 1", "--sample-level 217"),
    (CONFIG, True, "--dataset cifar10 --data-dir .", "--download"),
    (CONFIG, True, "--pool flatten --sample-level 216 5000 2000", "--pool avg"),
    (CONFIG, True, "--probe-images 3", "4 classes"),
    ({**CONFIG, "image_size": 30}, True, "--target-net vit", "--target-net vit"),
])
def test_encoders_that_cannot_be_probed(refused, tmp_path, config, activations, words, says):
    script(tmp_path / "encoder.pt", config if config is None or isinstance(config, str) else json.dumps(config),
           activations)
    assert says in refused([*FOLDER, "--encoder", "encoder.pt", *words.split()])


def test_an_encoder_that_does_not_say_what_it_was_trained_on(refused, tmp_path):
    """Of the user's own making, with no data set named anywhere."""
    script(tmp_path / "encoder.pt", json.dumps({"layers": ["stem", "avgpool"], "image_size": 32}))
    assert "--dataset" in refused(["--encoder", "encoder.pt", "--device", "cpu"])


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"hello", lambda b: b[:len(b) // 2], lambda b: b[:-100],
                                    lambda b: bytes(len(b))], ids=["empty", "text", "half", "cut", "zeros"])
def test_damaged_encoders(refused, tmp_path, damage):
    script(tmp_path / "encoder.pt", json.dumps(CONFIG))
    (tmp_path / "encoder.pt").write_bytes(damage((tmp_path / "encoder.pt").read_bytes()))
    assert "damaged" in refused([*FOLDER, "--encoder", "encoder.pt"])


# --- --figures --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("files", [[], ["config.json"], ["probes.csv"]])
def test_figures_of_a_folder_without_records(refused, tmp_path, files):
    (tmp_path / "run").mkdir()
    for name in files:
        (tmp_path / "run" / name).write_text("epoch,layer,target\n0,stem,class\n" if name.endswith("csv") else "{}")
    assert "--figures run" in refused(["--figures", "run"])


# --- checkpoints ------------------------------------------------------------------------------------------------------

@pytest.fixture
def state(tmp_path, few):
    """A checkpoint as a run writes it, in run/checkpoint.pt, of the small network for these pictures."""
    a = V.settings(FOLDER)
    net = V.Net(a, 32, 4)
    content = {"script": V.NAME, "config": V.config_of(a), "data": 216, "model": net.state_dict(), "step": 0,
               "optimizer": {}, "metrics": [], "seconds": 0.0}
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    return content


@pytest.mark.parametrize("change", ["--lr 0.037", "--layer 1", "--batch-size 30", "--seed 5", "--epochs 20",
                                    "--variance 2", "--no-stop-grad", "--arch RES-2-8", "--sample-level 5 2 1",
                                    "--target-net RES-1-8", "--pool flatten", "--objective simclr",
                                    "--probes svm ncc", "--mine-steps 5", "--data-dir few/class0"])
def test_resume_with_other_flags_is_refused_naming_them(refused, state, change):
    line = refused([*FOLDER, "--out", "run", "--resume", *change.split()])
    assert "other flags" in line and change.split()[0].replace("--no-", "--") in line


def test_resume_with_other_pictures_is_refused(refused, tmp_path, state):
    torch.save({**state, "data": 300}, tmp_path / "run" / "checkpoint.pt")
    line = refused([*FOLDER, "--out", "run", "--resume"])
    assert "300" in line and "216" in line


@pytest.mark.parametrize("words", ["--out run --resume", "--init run"])
def test_damaged_and_foreign_checkpoints_are_refused(refused, tmp_path, state, words):
    """Truncated, not a checkpoint, without its parts, of another script, or one whose pickle would run code."""
    file, words = tmp_path / "run" / "checkpoint.pt", [*FOLDER, *words.split()]
    whole = file.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:-100], b"", b"hello"):
        file.write_bytes(content)
        assert "damaged" in refused(words) and file.read_bytes() == content
    for content, says in [([1, 2], "damaged"), ({**state, "script": "simclr_deepaug"}, "simclr_deepaug"),
                          ({"script": V.NAME, "model": Trap()}, "damaged"),
                          *(({k: v for k, v in state.items() if k != part}, "damaged") for part in
                            ("config", "model", "optimizer", "step"))]:
        torch.save(content, file)
        assert says in refused(words)


@pytest.mark.parametrize("words", ["--arch RES-1-16", "--arch RES-2-8", "--projector 16 8", "--objective supervised"])
def test_init_of_other_sizes(refused, state, words):
    line = refused([*FOLDER, "--init", "run", *words.split()])
    assert "--init run" in line and "--arch" in line


def test_a_loss_that_is_not_finite_stops_the_run_naming_the_step(capsys, tmp_path, monkeypatch):
    """Code 2, and the checkpoint of the step before it stays: the fourth step breaks."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    calls, views = [0], V.train_views

    def broken(*args):
        calls[0] += 1
        return views(*args) * (float("nan") if calls[0] == 4 else 1)
    monkeypatch.setattr(V, "train_views", broken)
    with pytest.raises(SystemExit) as end:
        V.main([*FOLDER, "--save-every", "0", "--out", "run"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "step 4" in last and "--lr" in last
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 3


def test_a_broken_picture_is_no_reason_to_stop(capsys, tmp_path, few):
    """The refusals above are for what cannot work: a picture that cannot be read beside others is skipped."""
    shutil.copytree(few, tmp_path / "mixed")
    (tmp_path / "mixed" / "class0" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(AssertionError, match="long work"):
        V.main([*FOLDER, "--data-dir", "mixed", "--out", "run"])
    assert "00.png" in capsys.readouterr().out


def test_as_a_user_runs_it(cli):
    """The same through a real process: code 2, one line, nothing on stdout, no traceback."""
    done = cli("vicreg_probe.py", "--layer", "9")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
