"""Bad input of simcse_deepaug.py gets one line on stderr that says what is wrong, exit code 2, and no run folder."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Trap
from safetensors.torch import load_file, save_file
from test_simcse_run import TASKS, write_sts, write_text

import simcse_deepaug as S

SCRIPT = S
SMALL = ["--depth", "2", "--width", "32", "--vocab-size", "300", "--batch-size", "16", "--layer", "2", "--epochs", "1",
         "--device", "cpu"]
TEXT, STS = ["--train-file", "text.txt"], ["--sts-dir", "sts"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Text, STS tasks and a small untrained network with its tokenizer as a transformers folder."""
    folder = tmp_path_factory.mktemp("made")
    write_text(folder / "text.txt")
    write_sts(folder / "sts")
    tokenizer = S.learn_tokenizer(folder / "text.txt", 300, folder)
    a = S.settings(SMALL)
    net = S.build(a, S.load_config(a), tokenizer, "cpu")
    net.lm.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.save({"script": S.NAME, "config": S.config_of(S.settings([*SMALL, *TEXT])), "data": 300, "step": 0,
                "model": net.state_dict(), "optimizer": {}, "metrics": [], "evals": {}, "seconds": 0.0},
               folder / "checkpoint.pt")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, made):
    """Every test works in a folder of its own, with the text, and copies of what it damages."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(made / "text.txt", tmp_path)
    (tmp_path / "sts").symlink_to(made / "sts")


# --- flags ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, says", [
    ("--depth 12 --layer 14", ["--layer 14", "0 embeddings", "1-12", "13 output", "auto"]),
    ("--layer 4", ["--layer 4", "1-2", "3 output"]),
    ("--layer -1", ["--layer -1", "0 embeddings"]),
    ("--layer 1.5", ["--layer 1.5"]),
    ("--layer layer4", ["--layer layer4"]),
    ("--layer 1 none", ["--layer 1 none"]),
    ("--layer auto", ["--layer auto", "--init", "python simcse_deepaug.py --layer none"]),
    ("--rate 1", ["--rate", "[0, 1)"]),
    ("--rate -0.1", ["--rate", "[0, 1)"]),
    ("--rate nan", ["--rate", "[0, 1)"]),
    ("--rate half", ["--rate", "half"]),
    ("--sample 0", ["--sample", "(0, 1]"]),
    ("--sample 1.01", ["--sample", "(0, 1]"]),
    ("--components 0", ["--components"]),
    ("--transform mixup", ["--transform", "channel"]),
    ("--pooler max", ["--pooler", "cls-mlp"]),
    ("--dropout 1", ["--dropout", "[0, 1)"]),
    ("--dropout -0.1", ["--dropout", "[0, 1)"]),
    ("--batch-size 1", ["--batch-size"]),
    ("--batch-size 301", ["--batch-size", "301", "300"]),
    ("--batch-size -16", ["--batch-size"]),
    ("--epochs 0", ["--epochs"]),
    ("--epochs many", ["--epochs", "many"]),
    ("--max-length 3", ["--max-length"]),
    ("--depth 0", ["--depth"]),
    ("--width 40", ["--width", "32"]),
    ("--width -32", ["--width"]),
    ("--vocab-size 10", ["--vocab-size"]),
    ("--lr 0", ["--lr"]),
    ("--lr nan", ["--lr"]),
    ("--lr inf", ["--lr"]),
    ("--temperature -1", ["--temperature"]),
    ("--weight-decay -1", ["--weight-decay"]),
    ("--warmup 1", ["--warmup"]),
    ("--warmup -0.1", ["--warmup"]),
    ("--mlm-weight -1", ["--mlm-weight"]),
    ("--mlm-probability 0", ["--mlm-probability"]),
    ("--mlm-probability 1", ["--mlm-probability"]),
    ("--log-every 0", ["--log-every"]),
    ("--eval-every -1", ["--eval-every"]),
    ("--save-every -1", ["--save-every"]),
    ("--save-every nan", ["--save-every"]),
    ("--select dev --eval-every 0", ["--select dev", "--eval-every"]),
    ("--select dev", ["--select dev", "--sts-dir"]),
    ("--objective supervised", ["--objective supervised", "--sts-dir"]),
    ("--seed -1", ["--seed"]),
    ("--seed 99999999999999999999", ["--seed"]),
    ("--seeds 0 0", ["--seeds"]),
    ("--learning-speed 3", ["--learning-speed", "--help"]),
    ("--compare nowhere", ["--compare"]),
])
def test_refused_flags(refused, words, says):
    line = refused([*SMALL, *TEXT, *words.split()])
    for part in says:
        assert part in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_absent(refused):
    line = refused(["--device", "cuda"])
    assert "--device cuda" in line and "--device cpu" in line


def test_compile_without_a_compiler(refused, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "--compile" in refused([*SMALL, "--compile"])


def test_a_batch_that_the_processes_cannot_share(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--batch-size 16 must be a multiple of the 3 processes" in refused([*SMALL, *TEXT])


# --- training sentences -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["small", "model"])
@pytest.mark.parametrize("content, says", [
    (b"", "empty"), (b"\n \n\t\n", "no sentence"), (None, "no such file"),
    (b"good\n\ncaf\xe9\nmore\n", "line 3: not UTF-8"), ("folder", "cannot be read"),
    (b"one sentence\nand another one\n", "--batch-size 16 is more than the 2"),
    ("dz\u0142o\n".encode("utf-16"), "line 1: not UTF-8")], ids=str)
def test_train_file(refused, made, model, content, says):
    """Empty, blank, missing, a folder, too short or not UTF-8 (the line is named), with and without a vocabulary to
    learn from it."""
    if content == "folder":
        Path("bad.txt").mkdir()
    elif content is not None:
        Path("bad.txt").write_bytes(content)
    words = [*SMALL, "--train-file", "bad.txt", "--model", "small" if model == "small" else made / "model"]
    line = refused(words)
    assert says in line and ("bad.txt" in line or "--batch-size" in line)
    assert not list(Path().rglob("*.part")), "half-made files are left"


# --- the model folder -------------------------------------------------------------------------------------------------

def change_config(**changes):
    file = Path("model/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def lose_weights():
    weights = load_file("model/model.safetensors")
    save_file({k: v for k, v in weights.items() if ".layer.1." not in k}, "model/model.safetensors",
              metadata={"format": "pt"})


def cut(name):
    file = Path("model", name)
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def lose_tokenizer():
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        Path("model", name).unlink(missing_ok=True)


@pytest.mark.parametrize("damage, says", [
    (lambda: Path("model/model.safetensors").unlink(), "model.safetensors"),
    (lambda: cut("model.safetensors"), "model"),
    (lambda: Path("model/model.safetensors").write_bytes(b""), "model"),
    (lambda: Path("model/config.json").unlink(), "config.json"),
    (lambda: cut("config.json"), "config.json"),
    (lose_tokenizer, "no tokenizer"),
    (lambda: cut("tokenizer.json"), "tokenizer"),
    (lambda: change_config(model_type="gpt2"), "is a gpt2; this script knows bert, roberta"),
    (lambda: change_config(model_type="mystery"), "mystery"),
    (lambda: change_config(num_hidden_layers=4), "lack"),
    (lambda: change_config(hidden_size=64, intermediate_size=256), "model"),
    (lambda: change_config(vocab_size=200), "model"),
    (lose_weights, "lack"),
], ids=["no weights", "cut weights", "empty weights", "no config", "cut config", "no tokenizer", "cut tokenizer",
        "gpt2", "unknown type", "more layers in the config", "other sizes", "small vocabulary", "a layer's weights"])
def test_model_folder(refused, made, damage, says):
    shutil.copytree(made / "model", "model")
    damage()
    line = refused([*SMALL, *TEXT, "--model", "model"])
    assert "--model model" in line and says in line


def test_model_folder_missing(refused):
    assert "./no/such/folder" in refused([*SMALL, *TEXT, "--model", "./no/such/folder"])


def test_mask_token_missing(refused, made):
    """Without [MASK] no masked-language modelling; --no-mlm is named, and works."""
    shutil.copytree(made / "model", "model")
    file = Path("model/tokenizer_config.json")
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "mask_token"}
    file.write_text(json.dumps({**config, "mask_token": None}))
    if transformers.AutoTokenizer.from_pretrained("model").mask_token_id is not None:
        pytest.skip("this transformers gives BERT's tokenizer a [MASK] of its own accord")
    words = [*SMALL, *TEXT, "--model", "model"]
    assert "--no-mlm" in refused(words)
    assert S.main([*words, "--no-mlm", "--eval-only", *STS])["sts_tasks"] == 7


# --- STS tasks --------------------------------------------------------------------------------------------------------

def own_sts(made):
    Path("sts").unlink()
    shutil.copytree(made / "sts", "sts")


def scored(made):
    return S.main([*SMALL, *TEXT, *STS, "--model", str(made / "model"), "--eval-only"])


def test_a_missing_year_is_named_and_the_others_are_scored(capsys, made):
    """The average is over the tasks that are there, and says over how many."""
    whole = scored(made)
    assert whole["sts_tasks"] == 7 and {*TASKS} <= whole.keys()
    own_sts(made)
    shutil.rmtree("sts/STS/STS14-en-test")
    Path("sts/STS/STS12-en-test/STS.gs.MSRvid.txt").unlink()         # one file of a year is enough
    capsys.readouterr()
    report, out = scored(made), capsys.readouterr().out
    assert "STS14: left out" in out and "STS12: left out" in out and "STS.gs.MSRvid.txt" in out
    left = [t for t in TASKS if t not in ("STS12", "STS14")]
    assert report["sts_tasks"] == 5 and "STS14" not in report and "average of 5 task" in out
    assert all(report[t] == pytest.approx(whole[t], abs=1e-6) for t in left)
    assert report["sts"] == pytest.approx(sum(whole[t] for t in left) / 5)


def change_lines(file, change):
    path = Path("sts", file)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


GOLDS, PAIRS = "STS/STS13-en-test/STS.gs.FNWN.txt", "STS/STS13-en-test/STS.input.FNWN.txt"
BENCHMARK, SICK = "STS/STSBenchmark/sts-test.csv", "SICK/SICK_test_annotated.txt"


@pytest.mark.parametrize("file, change, says", [
    (GOLDS, lambda x: x[:-1], ["STS.gs.FNWN.txt has 11 lines", "has 12"]),
    (GOLDS, lambda x: [*x, b"3.0\n"], ["STS.gs.FNWN.txt has 13 lines", "has 12"]),
    (GOLDS, lambda x: [*x[:4], b"four\n", *x[5:]], ["STS.gs.FNWN.txt, line 5", "'four'"]),
    (GOLDS, lambda x: [b"nan\n", *x[1:]], ["STS.gs.FNWN.txt, line 1", "'nan'"]),
    (GOLDS, lambda x: [b"\n"] * len(x), ["no scored pair"]),
    (PAIRS, lambda x: [*x[:2], b"only one sentence\n", *x[3:]], ["STS.input.FNWN.txt, line 3", "too few"]),
    (PAIRS, lambda x: [], ["has 12 lines", "has 0"]),
    (PAIRS, lambda x: [b"caf\xe9" + x[0], *x[1:]], ["STS13", "not UTF-8"]),
    (BENCHMARK, lambda x: [*x[:6], x[6].replace(b"\t", b" "), *x[7:]], ["sts-test.csv, line 7", "too few"]),
    (BENCHMARK, lambda x: [b"main\tnews\t2012\t1\tmuch\ta b\tc d\n", *x[1:]], ["sts-test.csv, line 1", "'much'"]),
    (SICK, lambda x: [x[0], b"1\ta b\tc d\tinf\tNEUTRAL\n", *x[2:]], ["SICK_test_annotated.txt, line 2", "'inf'"]),
    (SICK, lambda x: x[:1], ["SICK_test_annotated.txt", "no scored pair"]),
])
def test_sts_files(refused, made, file, change, says):
    """Wrong line counts, scores that are no numbers, missing cells: the file and the line are named."""
    own_sts(made)
    change_lines(file, change)
    line = refused([*SMALL, *TEXT, *STS, "--model", made / "model"])
    for part in says:
        assert part in line


def test_pairs_without_a_score_are_left_out_and_other_line_ends_are_read(made):
    """As in the published files: an empty score leaves its pair out; CRLF and a missing last line end do no harm."""
    before = scored(made)
    own_sts(made)
    for file in (GOLDS, PAIRS, BENCHMARK, SICK):
        change_lines(file, lambda x: [b"\r\n".join(line.rstrip(b"\n") for line in x)])
    after = scored(made)
    assert all(after[t] == pytest.approx(before[t], abs=1e-9) for t in TASKS)
    change_lines(GOLDS, lambda x: [b"\n", *x[1:]])
    first, _, golds = S.read_pairs(Path("sts", PAIRS), (0, 1), scores=Path("sts", GOLDS))
    assert len(first) == len(golds) == 11 and scored(made)["STS13"] != before["STS13"]


def test_sts_dir_without_any_task_or_without_dev(refused, made):
    Path("empty").mkdir()
    for name in ("empty", "nowhere"):
        line = refused([*SMALL, *TEXT, "--sts-dir", name])
        assert f"--sts-dir {name}" in line and "SentEval" in line
    own_sts(made)
    Path("sts/STS/STSBenchmark/sts-dev.csv").unlink()
    words = [*SMALL, *TEXT, *STS, "--model", made / "model"]
    assert "dev pairs" in refused([*words, "--select", "dev"])
    assert "--layer auto" in refused([*words, "--layer", "auto"])
    Path("sts/STS/STSBenchmark/sts-train.csv").unlink()
    assert "training pairs" in refused([*words, "--objective", "supervised"])


# --- checkpoints ------------------------------------------------------------------------------------------------------

def test_resume_damaged_or_foreign_checkpoints(refused, made):
    """Cut, empty, not a checkpoint, without its parts, of another script: one line, and the file is kept."""
    Path("run").mkdir()
    file, words = Path("run/checkpoint.pt"), [*SMALL, *TEXT, "--out", "run", "--resume"]
    whole, state = (made / "checkpoint.pt").read_bytes(), torch.load(made / "checkpoint.pt")
    for content in (whole[:len(whole) // 2], whole[:-100], b"", b"hello", bytes(len(whole))):
        file.write_bytes(content)
        line = refused(words)
        assert "damaged" in line and "checkpoint.pt" in line and file.read_bytes() == content
    torch.save({**state, "script": "simclr_deepaug"}, file)
    assert "written by simclr_deepaug.py" in refused(words)
    for part in ("config", "data", "model", "optimizer", "step"):
        torch.save({k: v for k, v in state.items() if k != part}, file)
        assert "damaged" in refused(words)


def test_init_missing_corrupt_foreign_or_of_other_sizes(refused, made):
    """The line names the file; loading runs no code that a file holds."""
    shutil.copy(made / "checkpoint.pt", "good.pt")
    state = torch.load("good.pt")
    torch.save({**state, "script": "vicreg_probe"}, "other.pt")
    torch.save({"script": S.NAME, "model": Trap()}, "trap.pt")
    Path("cut.pt").write_bytes(Path("good.pt").read_bytes()[:5000])
    Path("run").mkdir()
    for name, flags, part in (("nowhere", [], "no checkpoint"), ("run", [], "no checkpoint"), ("cut.pt", [], "damaged"),
                              ("trap.pt", [], "damaged"), ("other.pt", [], "vicreg_probe"),
                              ("good.pt", ["--width", 64], "--width"), ("good.pt", ["--depth", 3], "--"),
                              ("good.pt", ["--vocab-size", 200], "--")):
        line = refused([*SMALL, *TEXT, "--init", name, *flags])
        assert part in line and name.removesuffix(".pt") in line
    assert not Path("sprung").exists()


def test_a_loss_that_is_not_finite_stops_the_run(capsys):
    """Code 2, the step is named, and what is in the folder is the last checkpoint with finite weights, or none."""
    with pytest.raises(SystemExit) as end:
        S.main([*SMALL, *TEXT, "--lr", "1e30", "--warmup", "0", "--save-every", "0", "--out", "run"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "step" in last and "--lr" in last
    if Path("run/checkpoint.pt").exists():
        state = torch.load("run/checkpoint.pt")
        assert all(v.isfinite().all() for v in state["model"].values()) and f"step {state['step'] + 1}" in last


def test_as_a_user_runs_it(cli):
    """The same through a real process: code 2, one line, nothing on stdout, no traceback."""
    done = cli("simcse_deepaug.py", "--rate", "1", env={**os.environ})
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
