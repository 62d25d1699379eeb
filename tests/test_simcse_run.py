"""Whole runs of simcse_deepaug.main([...]) on 300 sentences with a 2-layer BERT: the run folder, the export, kill and
resume, two processes, every option."""
import csv
import hashlib
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from conftest import same_bits
from safetensors.torch import load_file

import simcse_deepaug as S

CPU = torch.device("cpu")
PNG = (b"\x89PNG", b"IEND\xaeB`\x82")                                  # how a whole file starts and ends
TASKS = ["STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R"]
PRELOAD = ["simcse_deepaug", "cka", "transformers.models.bert.modeling_bert",      # what the children would import
           "transformers.models.bert.tokenization_bert", "transformers.models.auto.modeling_auto"]
WORLD, B = 2, 5                                                      # processes, sentences in each


def write_sts(folder: Path, dev: int = 90) -> Path:
    """The seven tasks in SentEval's layout, made of the grammar's pairs: 12 a subset, `dev` and 48 of STS-B."""
    grammar, part = S.Grammar(0), 10
    for year, names in S.YEARS.items():
        at = folder / f"STS/STS{year}-en-test"
        at.mkdir(parents=True)
        for name in names.split():
            first, second, golds = grammar.pairs(12, True, part := part + 1)
            (at / f"STS.input.{name}.txt").write_text("".join(f"{a}\t{b}\n" for a, b in zip(first, second)))
            (at / f"STS.gs.{name}.txt").write_text("".join(f"{g}\n" for g in golds))
    (folder / "STS/STSBenchmark").mkdir()
    (folder / "SICK").mkdir()
    for split, n in (("train", 48), ("dev", dev), ("test", 24)):
        rows = zip(*grammar.pairs(n, True, part := part + 1))
        (folder / f"STS/STSBenchmark/sts-{split}.csv").write_text(
            "".join(f"main\tnews\t2012\t{i:04}\t{g:.3f}\t{a}\t{b}\n" for i, (a, b, g) in enumerate(rows)))
    rows = zip(*grammar.pairs(24, True, part + 1))
    (folder / "SICK/SICK_test_annotated.txt").write_text(
        "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
        + "".join(f"{i}\t{a}\t{b}\t{g}\tNEUTRAL\n" for i, (a, b, g) in enumerate(rows)))
    return folder


def write_text(path: Path, n: int = 300, seed: int = 0) -> Path:
    path.write_text("\n".join(S.Grammar(seed).sentences(n)) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with text.txt and sts/."""
    folder = tmp_path_factory.mktemp("data")
    write_text(folder / "text.txt")
    write_sts(folder / "sts")
    return folder


def flags(data, *more):
    """18 steps on the 300 sentences; `more` wins over what stands here."""
    return ["--train-file", str(data / "text.txt"), "--sts-dir", str(data / "sts"), "--depth", "2", "--width", "32",
            "--vocab-size", "300", "--epochs", "1", "--batch-size", "16", "--layer", "2", "--device", "cpu",
            *map(str, more)]


@pytest.fixture(scope="module")
def done(data):
    """One finished run; tests read its folder and change nothing in it."""
    S.main(flags(data, "--export", "pt2", "--log-every", 5, "--eval-every", 6, "--out", data / "runs" / "base"))
    return data / "runs" / "base"


def live_of(run, data, *more):
    """The trained network of a run folder in eval mode."""
    a = S.settings(flags(data, *more))
    net = S.build(a, S.load_config(a), transformers.AutoTokenizer.from_pretrained(run / "tokenizer"), CPU)
    net.load_state_dict(load(run)["model"])
    return net.eval()


@pytest.fixture(scope="module")
def live(done, data):
    return live_of(done, data)


def load(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def report_of(out):
    return json.loads((Path(out) / "report.json").read_text())


def rows_of(out):
    with open(Path(out) / "metrics.csv") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


# --- the run folder ---------------------------------------------------------------------------------------------------

def test_importing_does_nothing(tmp_path):
    """No output, no file, no argument read, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", "import simcse_deepaug", "--rate", "9"],
                          cwd=tmp_path, text=True, capture_output=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(Path(S.__file__).parent)})
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_run_folder_holds_every_file_of_the_design_and_no_leftover(done):
    names = {str(p.relative_to(done)) for p in done.rglob("*") if p.is_file()}
    assert {"config.json", "metrics.csv", "checkpoint.pt", "encoder.pt", "encoder.pt2", "weights.safetensors",
            "report.json", "curves.png", "cka.png", "tokenizer/tokenizer.json", "model/config.json",
            "model/model.safetensors", "model/tokenizer.json", "model/modules.json"} <= names
    assert not [p for p in done.parent.rglob("*") if ".part" in p.name]
    for picture in done.glob("*.png"):
        content = picture.read_bytes()
        assert content.startswith(PNG[0]) and content.endswith(PNG[1]) and len(content) > 5000


def test_report_holds_the_final_measurements_flat(done):
    report = report_of(done)
    scores = [*TASKS, "sts", "dev"]
    assert {*scores, *(k + "_untrained" for k in scores), "sentences_per_second", "seconds", "loss", "sts_tasks",
            "alignment_dev", "uniformity_dev", "export_difference", "flags", "layers_augmented"} <= report.keys()
    assert all(math.isfinite(v) for v in report.values() if isinstance(v, (int, float)))
    assert report["sts"] == pytest.approx(statistics.mean(report[t] for t in TASKS)) and report["sts_tasks"] == 7
    assert all(-100 <= report[k] <= 100 for k in scores) and report["sts"] != report["sts_untrained"]
    assert report["steps"] == 18 and report["layers_augmented"] == [2] and report["export_difference"] <= 1e-4


def test_the_vocabulary_learned_from_a_text_is_always_the_same(data, tmp_path):
    """Where it is learned does not matter: else no seed would fix a run."""
    first, again = (S.learn_tokenizer(data / "text.txt", 300, tmp_path / name) for name in ("one", "two"))
    assert first.get_vocab() == again.get_vocab() and first.get_vocab()["[PAD]"] == 0 and len(first) == 300


def test_main_returns_the_report_and_the_same_flags_give_the_same_bits(done, data, tmp_path):
    """A second run with the same flags: every weight, every score; another seed gives others."""
    again = S.main(flags(data, "--log-every", 5, "--eval-every", 6, "--out", tmp_path / "again"))
    assert json.loads(json.dumps(again)) == report_of(tmp_path / "again")
    assert same_bits(load(tmp_path / "again")["model"], load(done)["model"])
    assert all(again[k] == report_of(done)[k] for k in [*TASKS, "dev", "loss", "uniformity_dev"])
    other = S.main(flags(data, "--seed", 1, "--out", tmp_path / "other"))
    assert other["sts"] != again["sts"] and other["loss"] != again["loss"]


def test_config_and_checkpoint_hold_flags_versions_and_source(done):
    config, state = json.loads((done / "config.json").read_text()), load(done)
    assert config["torch"] == torch.__version__ and config["transformers"] == transformers.__version__
    assert config["device"] == "cpu" and config["seed"] == 0 and config["layer"] == ["2"] and config["processes"] == 1
    assert config["script_sha256"] == hashlib.sha256(Path(S.__file__).read_bytes()).hexdigest()
    assert state["source"] == Path(S.__file__).read_text() and state["script"] == "simcse_deepaug"
    assert state["step"] == 18 and {"model", "optimizer", "config", "metrics", "evals"} <= state.keys()


def test_metrics_and_evals_are_one_row_each(done, data):
    """A row at every 5th step and at every evaluation; the loss is the objective plus a tenth of the masked one."""
    rows, a = rows_of(done), S.settings(flags(data))
    assert [r["step"] for r in rows] == [5, 6, 10, 12, 15, 18]
    for r in rows:
        assert r["loss"] == pytest.approx(r["objective"] + 0.1 * r["mlm"], rel=1e-5) and r["mlm"] > 0
        assert r["lr"] == pytest.approx(S.learning_rate(int(r["step"]) - 1, a, 18)) and r["sentences_per_second"] > 0
        assert 1 <= r["effective_rank"] <= 32 and 0 <= r["alignment"] <= 4 and -8 <= r["uniformity"] <= 0
    evals = json.loads((done / "evals.json").read_text())
    assert list(evals) == ["0", "6", "12", "18"] and all({"dev", "alignment_dev", "uniformity_dev"} == e.keys()
                                                         for e in evals.values())
    assert evals["18"]["dev"] == report_of(done)["dev"] and evals["0"]["dev"] == report_of(done)["dev_untrained"]


# --- the export -------------------------------------------------------------------------------------------------------

def batch(n, length, left, vocab=300, pad=0, seed=0):
    """(ids, mask) [n, length]: sentences of all lengths from `length` down to 2, padding on the given side."""
    g = torch.Generator().manual_seed(seed + n + length)
    ids, mask = torch.randint(5, vocab, (n, length), generator=g), torch.zeros(n, length, dtype=torch.long)
    for i in range(n):
        used = max(2, length - (length - 2) * i // max(1, n - 1)) if n > 1 else length
        mask[i, length - used if left else 0:length if left else used] = 1
    return torch.where(mask.bool(), ids, pad), mask


SHAPES = [(n, length, left) for n in (1, 7, 64) for length in (3, 32, None) for left in (False, True)]


def test_encoder_needs_torch_alone_and_equals_the_live_network(done, live, tmp_path):
    """A process that knows nothing of the script loads the file: forward and activations at every batch size, length
    and side of padding are those of the network."""
    inputs = [batch(n, length or live.longest, left) for n, length, left in SHAPES]
    assert live.longest == 512
    torch.save(inputs, tmp_path / "in.pt")
    code = ("import sys, torch; m = torch.jit.load(sys.argv[1]); torch.set_grad_enabled(False); "
            "torch.save([[m(*x), m(*x) if len(x[0]) < 64 else None, m.activations(*x)] for x in torch.load('in.pt')],"
            " 'out.pt')")
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code, done / "encoder.pt"], cwd=tmp_path, check=True)
    for (ids, mask), (y, again, acts) in zip(inputs, torch.load(tmp_path / "out.pt")):
        assert again is None or torch.equal(y, again), "two calls differ: dropout is in the export"
        with torch.no_grad():
            torch.testing.assert_close(y, live(ids, mask), rtol=1e-4, atol=1e-5)
            expected = live.activations(ids, mask)
        assert len(acts) == len(expected) == 4
        for ours, theirs in zip(acts, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing(done):
    """A sentence alone, padded on the left, on the right, and among longer ones has one embedding."""
    encoder, (ids, mask) = torch.jit.load(done / "encoder.pt"), batch(1, 9, False)
    with torch.no_grad():
        alone = encoder(ids, mask)
        for left in (False, True):
            zero = torch.zeros(1, 23, dtype=torch.long)
            row = [torch.cat([zero, x] if left else [x, zero], 1) for x in (ids, mask)]
            longer = batch(6, 32, left)
            for x, m in (row, [torch.cat(pair) for pair in zip(row, longer)]):
                torch.testing.assert_close(encoder(x, m)[:1], alone, rtol=1e-4, atol=1e-5)


def test_too_long_a_sequence_gets_a_clear_error(done):
    """A message with both lengths from forward and activations, no index error; shapes that do not fit too."""
    encoder = torch.jit.load(done / "encoder.pt")
    for call in (encoder, encoder.activations):
        with pytest.raises(torch.jit.Error, match="513 tokens are too many: this encoder takes at most 512") as e:
            call(*batch(2, 513, False))
        assert "index out of range" not in str(e.value)
    ids, mask = batch(2, 5, False)
    for bad in ((ids[0], mask[0]), (ids, mask[:, :4]), (ids, mask[:1])):
        with pytest.raises(torch.jit.Error, match="must both be"):
            encoder(*bad)


def test_encoder_carries_its_config(done, live):
    extra = {"config.json": ""}
    encoder = torch.jit.load(done / "encoder.pt", _extra_files=extra)
    config, acts = json.loads(extra["config.json"]), encoder.activations(*batch(3, 8, True))
    assert config["layers"] == ["embeddings", "layer1", "layer2", "output"] and len(acts) == 4
    assert config["layer_numbers"] == {"embeddings": 0, "layer1": 1, "layer2": 2, "output": 3}
    assert config["dim"] == 32 and config["longest"] == 512 and config["pooler"] == "mean"
    assert config["flags"]["layer"] == ["2"] and config["measurements"]["sts"] == report_of(done)["sts"]


def test_encoder_can_be_fine_tuned_and_moved(done, live):
    """Not frozen: gradients equal the live network's, a step changes the output; .to another dtype works (tests/gpu
    moves it to CUDA; torch refuses to move any TorchScript module to 'meta')."""
    encoder, x = torch.jit.load(done / "encoder.pt"), batch(7, 12, True)
    encoder.train()
    encoder(*x).square().sum().backward()
    live.zero_grad()
    live(*x).square().sum().backward()
    expected = {k: p.grad for k, p in live.named_parameters() if p.grad is not None}
    got = {k.removeprefix("traced.net."): p.grad for k, p in encoder.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() and len(got) > 30
    for k, grad in got.items():
        torch.testing.assert_close(grad, expected[k], rtol=1e-3, atol=1e-4 * float(grad.abs().max()) + 1e-6)
    before = encoder(*x).detach()
    torch.optim.SGD(encoder.parameters(), 0.01).step()
    assert not torch.allclose(encoder(*x), before)
    moved = torch.jit.load(done / "encoder.pt").to(torch.float64)
    with torch.no_grad():
        y = moved(*x)
        torch.testing.assert_close(y.float(), live(*x), rtol=1e-4, atol=1e-5)
    assert y.dtype == torch.float64


def test_pt2_reloads_to_the_same_numbers(done, live):
    """torch.export's file at other batch sizes and lengths."""
    program = torch.export.load(done / "encoder.pt2").module()
    for n, length, left in SHAPES:
        x = batch(n, length or (live.longest if n < 64 else 100), left)
        with torch.no_grad():
            torch.testing.assert_close(program(*x), live(*x), rtol=1e-4, atol=1e-5)


def pooled_as_the_files_say(folder, ids, mask):
    """What sentence-transformers does with a folder, from its files alone: AutoModel, pooling, dense layers."""
    with S.quiet_transformers():
        model = transformers.AutoModel.from_pretrained(folder).eval()
    h = model(input_ids=ids, attention_mask=mask).last_hidden_state.detach()
    modules = json.loads((folder / "modules.json").read_text())
    assert [m["idx"] for m in modules] == list(range(len(modules)))
    kinds = [m["type"].split(".")[-1] for m in modules]
    assert kinds[:2] == ["Transformer", "Pooling"] and modules[0]["path"] == ""
    how = json.loads((folder / modules[1]["path"] / "config.json").read_text())
    assert how["word_embedding_dimension"] == h.shape[2]
    assert [k for k, v in how.items() if k.startswith("pooling_mode") and v] in \
        [["pooling_mode_cls_token"], ["pooling_mode_mean_tokens"]]
    if how["pooling_mode_cls_token"]:
        z = h[:, 0]
    else:
        z = torch.stack([row[m.bool()].mean(0) for row, m in zip(h, mask)])
    for kind, m in zip(kinds[2:], modules[2:]):
        how, weights = (read(folder / m["path"] / name) for read, name in
                        ((lambda p: json.loads(p.read_text()), "config.json"), (load_file, "model.safetensors")))
        assert kind == "Dense" and how["activation_function"] == "torch.nn.modules.activation.Tanh"
        assert weights["linear.weight"].shape == (how["out_features"], how["in_features"])
        z = torch.tanh(z @ weights["linear.weight"].T + weights["linear.bias"])
    return z


@pytest.mark.parametrize("more", ["--pooler cls", "--pooler cls-mlp", "--pooler mean", "--pooler cls --no-mlm",
                                  "--pooler cls-mlp --objective supervised", "--pooler mean --objective supervised"])
def test_every_pooler_gives_one_embedding_in_all_files(data, tmp_path, more):
    """encoder.pt, the live network, and model/ through AutoModel and the sentence-transformers files agree;
    weights.safetensors holds model/'s weights, which are the checkpoint's."""
    report = S.main(flags(data, *more.split(), "--epochs", 2, "--out", tmp_path / "run"))
    out, live = tmp_path / "run", live_of(tmp_path / "run", data, *more.split())
    assert math.isfinite(report["sts"]) and (out / "model/2_Dense").exists() == ("cls-mlp" in more
                                                                                and "supervised" not in more)
    x = batch(7, 20, False)
    with torch.no_grad():
        expected = live(*x)
        torch.testing.assert_close(torch.jit.load(out / "encoder.pt")(*x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled_as_the_files_say(out / "model", *x), expected, rtol=1e-4, atol=1e-5)
    weights = load_file(out / "weights.safetensors")
    assert same_bits(weights, load_file(out / "model" / "model.safetensors"))
    assert any(k.startswith("bert.") for k in weights) == ("--no-mlm" not in more)
    state = live.lm.state_dict()
    for k, v in weights.items():
        assert torch.equal(v, state[k if k in state else "bert." + k]), k


def tiny_model(folder, family, tokenizer):
    """A folder of a random 2-layer network of this family with the run's tokenizer."""
    sizes = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    if family == "distilbert":
        config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=1, hidden_dim=64, **sizes)
    else:
        kind = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig,
                "camembert": transformers.CamembertConfig, "xlm-roberta": transformers.XLMRobertaConfig}[family]
        config = kind(hidden_size=32, num_hidden_layers=2, num_attention_heads=1, intermediate_size=64,
                      max_position_embeddings=66, **sizes)
    torch.manual_seed(3)
    with S.quiet_transformers():
        transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "camembert", "distilbert"])
def test_every_family_is_exported_as_transformers_computes_it(done, data, tmp_path, family):
    """encoder.pt of an untrained folder of each family equals transformers' own model of that folder, right padding;
    on the left it gives the same; one token more than its positions is refused by number."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(done / "tokenizer")
    folder = tiny_model(tmp_path / "hub", family, tokenizer)
    a = S.settings(flags(data, "--model", folder, "--pooler", "mean"))
    net = S.build(a, S.load_config(a), tokenizer, CPU)
    assert S.export(a, net, tokenizer, tmp_path, {}) <= 1e-4
    encoder, pad = torch.jit.load(tmp_path / "encoder.pt"), tokenizer.pad_token_id
    longest = {"bert": 66, "distilbert": 512}.get(family, 66 - 1 - pad)    # RoBERTa's positions start after padding's
    with torch.no_grad():
        for length in (3, 32, longest):
            right, left = batch(7, length, False, pad=pad), batch(7, length, True, pad=pad)
            expected = pooled_as_the_files_say(tmp_path / "model", *right)
            torch.testing.assert_close(encoder(*right), expected, rtol=1e-4, atol=1e-5)
            ids, mask = (torch.stack([torch.roll(row, int((m == 0).sum())) for row, m in zip(x, right[1])])
                         for x in right)                             # the same sentences moved to the right end
            assert torch.equal(mask, left[1])
            torch.testing.assert_close(encoder(ids, mask), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(torch.jit.Error, match=f"at most {longest}"):
        encoder(*batch(2, longest + 1, False))


def test_the_exported_tokenizers_do_not_cut_sentences(done):
    """tokenizer/ and model/ know no limit of the training (32 tokens): a user's long sentence stays whole."""
    from tokenizers import Tokenizer
    text = " ".join(["the doctor"] * 100)
    for folder in ("tokenizer", "model"):
        assert len(Tokenizer.from_file(str(done / folder / "tokenizer.json")).encode(text).ids) > 200, folder
        assert len(transformers.AutoTokenizer.from_pretrained(done / folder)(text)["input_ids"]) > 200, folder


def test_a_run_starts_from_the_exported_folder(done, data, tmp_path):
    """--model RUN/model gives the trained network's scores before training (--eval-only) and trains on."""
    words = ["--model", done / "model", "--pooler", "mean"]
    before = S.main(flags(data, *words, "--eval-only"))
    assert before == {k: report_of(done)[k] for k in before} and {"sts", "dev", *TASKS} <= before.keys()
    report = S.main(flags(data, *words, "--out", tmp_path / "run"))
    assert report["sts_untrained"] == before["sts"] and report["sts"] != before["sts"]


# --- kill and resume --------------------------------------------------------------------------------------------------

def resumable(data, *more):
    """36 steps with dropout, augmentation and masking, of which the dev score keeps the best."""
    return flags(data, "--epochs", 2, "--select", "dev", "--eval-every", 4, "--log-every", 1, *more)


def signal_at(patch, name, call, number):
    """Send this process the signal when the script's function `name` is called for the call-th time."""
    calls, function = [0], getattr(S, name)

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)
    patch.setattr(S, name, wrapped)


def stopped_at(call, number, words):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, "simcse_loss", call, number)
        with pytest.raises(SystemExit) as end:
            S.main(words)
    assert end.value.code == 128 + number


@pytest.fixture(scope="module")
def straight(data):
    """The uninterrupted run."""
    S.main(resumable(data, "--out", data / "runs" / "straight"))
    return data / "runs" / "straight"


@pytest.fixture(scope="module")
def halfway(data):
    """A run stopped by SIGTERM in its 23rd step: a folder to copy and go on from."""
    out = data / "runs" / "halfway"
    stopped_at(23, signal.SIGTERM, resumable(data, "--out", out))
    assert load(out)["step"] == 23 and not (out / "report.json").exists()
    return out


@pytest.fixture
def half(halfway, data, tmp_path):
    """A copy of it beside the other runs, so that the tokens made once are found."""
    copy = shutil.copytree(halfway, data / "runs" / tmp_path.name)
    yield copy
    shutil.rmtree(copy)


def assert_same_run(out, straight):
    ours, theirs = load(out), load(straight)
    for part in ("model", "optimizer", "step", "evals"):
        assert same_bits(ours[part], theirs[part]), part
    best = [torch.load(p / "best.pt", weights_only=True) for p in (out, straight)]
    assert same_bits(*best)
    rows, expected = ([{k: v for k, v in r.items() if k != "sentences_per_second"} for r in rows_of(p)]
                      for p in (out, straight))
    assert rows == expected and len(rows) == 36                      # every loss, once
    ours, theirs = report_of(out), report_of(straight)
    timed = ("seconds", "sentences_per_second", "run")
    assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}


def test_stopped_and_resumed_reaches_the_same_bits(data, straight, half):
    S.main(resumable(data, "--out", half, "--resume"))
    assert_same_run(half, straight)


def test_ctrl_c_prints_the_command_that_goes_on(data, straight, tmp_path, capsys):
    """The last line printed, run as it is, finishes the run."""
    stopped_at(5, signal.SIGINT, resumable(data, "--out", data / "runs" / "interrupted"))
    last = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert last[0] == "python" and last[1].endswith("simcse_deepaug.py") and last[-1] == "--resume"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL        # the handlers are put back
    S.main(last[2:])
    assert_same_run(data / "runs" / "interrupted", straight)


def child_main(words):
    torch.set_num_threads(1)
    S.main(words)


def test_killed_twice_reaches_the_same_bits(data, straight):
    """SIGKILL at random moments while a checkpoint is written at every step, resumed each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    out, rng, steps = data / "runs" / "killed", random.Random(0), []
    words = resumable(data, "--out", out, "--resume", "--save-every", 0)
    for writes in (2, 15):                                            # checkpoints to wait for before each kill
        child, checkpoint, deadline = context.Process(target=child_main, args=(words,)), out / "checkpoint.pt", 0
        last = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        child.start()
        deadline = time.time() + 120
        while writes and child.is_alive() and time.time() < deadline:
            now = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            writes, last = writes - (now != last), now
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))
        child.kill()
        child.join()
        assert child.exitcode == -9
        steps.append(load(out)["step"])                              # whole, whenever the kill came
    assert steps == sorted(steps) and 0 < steps[0] < steps[-1] < 36, steps
    S.main(words)
    assert_same_run(out, straight)


def test_a_finished_run_may_be_resumed(data, straight, tmp_path):
    """Nothing is left to train: measurements and export are made again, and are the same."""
    out = shutil.copytree(straight, data / "runs" / "finished")
    for name in ("report.json", "encoder.pt", "curves.png"):
        (out / name).unlink()
    S.main(resumable(data, "--out", out, "--resume"))
    assert_same_run(out, straight)
    assert (out / "encoder.pt").exists() and (out / "curves.png").exists()


def test_select_dev_keeps_the_best_weights(data, straight):
    """The report's dev score is the highest of the evaluations; the checkpoint holds the last weights."""
    evals = {int(k): e["dev"] for k, e in load(straight)["evals"].items()}
    assert list(evals) == [*range(0, 37, 4)] and report_of(straight)["dev"] == max(evals.values())
    live = live_of(straight, data)
    weights = load_file(straight / "weights.safetensors")
    best = torch.load(straight / "best.pt", weights_only=True)
    assert all(torch.equal(v, best["lm." + k]) for k, v in weights.items())
    if max(evals, key=evals.get) != 36:
        assert not same_bits(best, dict(live.state_dict()))


def refused(capsys, words) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        S.main([str(w) for w in words])
    lines = [line.rsplit("\r")[-1] for line in capsys.readouterr().err.split("\n")]    # "\r": a bar wiped itself away
    assert end.value.code == 2 and len(lines) == 2 and lines[1] == "", lines
    return lines[0]


@pytest.mark.parametrize("change", ["--lr 0.1", "--layer 1", "--rate 0.25", "--batch-size 12", "--seed 5", "--epochs 3",
                                    "--no-stop-grad", "--no-mlm", "--pooler cls", "--select last", "--dropout 0",
                                    "--temperature 0.1", "--objective supervised", "--transform pca"])
def test_resume_with_other_flags_is_refused_naming_them(data, halfway, capsys, change):
    before = {p.name: p.stat().st_mtime_ns for p in halfway.iterdir()}
    line = refused(capsys, [*resumable(data, "--out", halfway, "--resume"), *change.split()])
    assert change.split()[0].replace("--no-", "--") in line
    assert {p.name: p.stat().st_mtime_ns for p in halfway.iterdir()} == before


@pytest.mark.parametrize("how", ["fewer sentences", "as many others"])
def test_resume_with_changed_text_is_refused(data, tmp_path, capsys, how):
    """Other sentences make other batches: the run cannot go on to the same bits."""
    words = resumable(data, "--train-file", write_text(tmp_path / "own.txt"), "--out", tmp_path / "run")
    stopped_at(3, signal.SIGTERM, words)
    write_text(tmp_path / "own.txt", n=200 if how == "fewer sentences" else 300, seed=1)
    assert "other sentences" in refused(capsys, [*words, "--resume"])


def test_resume_without_a_checkpoint_starts_at_the_beginning(data, tmp_path, capsys):
    report = S.main(flags(data, "--out", tmp_path / "run", "--resume"))
    assert "no checkpoint" in capsys.readouterr().out
    assert report["steps"] == 18 and load(tmp_path / "run")["step"] == 18


def test_an_older_run_moves_aside(data, tmp_path):
    """The same --out again: what was there is kept whole under another name."""
    for name, text in (("run", "newer"), ("run.1", "oldest")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "note.txt").write_text(text)
    S.main(flags(data, "--out", tmp_path / "run"))
    assert {p.parent.name: p.read_text() for p in tmp_path.rglob("note.txt")} == {"run.1": "oldest", "run.2": "newer"}
    assert (tmp_path / "run" / "report.json").exists()


def test_the_text_is_tokenised_once(data, straight, half):
    """A resumed run and a run beside it find the tokens and the vocabulary that the first one made."""
    def made():
        return {p: p.stat().st_mtime_ns for p in (data / "runs" / "text").rglob("*") if p.is_file()}
    before = made()
    S.main(resumable(data, "--out", half, "--resume"))
    S.main(flags(data, "--out", data / "runs" / "beside"))
    assert made() == before and len(before) > 2


# --- two processes ----------------------------------------------------------------------------------------------------

def ddp_net(kind):
    """Without dropout anywhere: rate 0 leaves of Deep Augmentation only its stop-gradient."""
    more = {"stop": ["--stop-grad"], "none": ["--no-stop-grad"], "supervised": ["--objective", "supervised"]}[kind]
    a = S.settings(["--depth", "2", "--width", "32", "--dropout", "0", "--rate", "0", "--layer", "1", "3", "--pooler",
                    "cls", *more])
    torch.manual_seed(0)
    config = S.load_config(a)
    config.vocab_size = 50
    return S.Net(a, transformers.AutoModelForMaskedLM.from_config(config), [1, 3]).train()


def ddp_batch(rank):
    """What one process gets: (ids, mask, rows, masked ids, masked rows, index, targets), two views of B sentences.
    Process 1 has longer sentences and more masked tokens than process 0."""
    g = torch.Generator().manual_seed(10 + rank)
    ids, mask = batch(B, 7 + 3 * rank, False, vocab=50, seed=rank)
    ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
    masked, rows = ids.clone(), [torch.rand(2 * B, generator=g) < 0.5 for _ in range(2)]
    index = torch.randperm(ids.numel(), generator=g)[:4 + 9 * rank].sort().values
    index = index[mask.flatten()[index] == 1]
    targets = ids.flatten()[index]
    masked.view(-1)[index] = 3
    return ids, mask, rows[0], masked, rows[1], index, targets


def golds_of(rank):
    return torch.rand(B, generator=torch.Generator().manual_seed(30 + rank)) * 5


def ddp_worker(rank, folder):
    """One of the processes: the script's losses through DistributedDataParallel, gradients kept."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        result = {}
        for kind in ("stop", "none", "supervised"):
            net = ddp_net(kind)
            if rank:                                                 # DistributedDataParallel sends rank 0's weights
                for p in net.parameters():
                    p.data.zero_()
            model = torch.nn.parallel.DistributedDataParallel(net)
            for _ in range(2):                                       # a second step finds a reducer left unfinished
                net.zero_grad()
                *x, targets = ddp_batch(rank)
                z, logits = model(*x)
                if kind == "supervised":
                    loss = F.mse_loss(S.relatedness(net, *z.chunk(2)), golds_of(rank))
                else:
                    loss = S.simcse_loss(*z.chunk(2), 0.05)
                loss = loss + 0.1 * S.mlm_loss(logits, targets)
                loss.backward()
            result[kind] = loss.detach(), {k: p.grad for k, p in net.named_parameters()}
        torch.save(result, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each process saved."""
    folder = str(tmp_path_factory.mktemp("two"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    children = [context.Process(target=ddp_worker, args=(rank, folder)) for rank in range(WORLD)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(WORLD)]


def whole_batch():
    """Both processes' batches as one: first views of all, then second views, padded to the longest of all."""
    parts = [ddp_batch(rank) for rank in range(WORLD)]
    longest = max(p[0].shape[1] for p in parts)
    order = [(rank, view * B + i) for view in range(2) for rank in range(WORLD) for i in range(B)]

    def rows(which):
        return torch.stack([F.pad(parts[r][which][i], (0, longest - parts[r][which].shape[1])) if
                            parts[r][which].ndim == 2 else parts[r][which][i] for r, i in order])
    index, targets = [], []
    for rank, part in enumerate(parts):
        for place, target in zip(part[5].tolist(), part[6].tolist()):
            i, column = divmod(place, part[0].shape[1])
            index.append(order.index((rank, i)) * longest + column)
            targets.append(target)
    return *(rows(k) for k in range(5)), torch.tensor(index), torch.tensor(targets)


def slow_loss(net, kind, z, logits, targets):
    """The formulas with loops: SimCSE's Eq. 1 or the squared error, and a tenth of the masked tokens' mean."""
    n, total = len(z) // 2, 0
    if kind == "supervised":
        golds = torch.cat([golds_of(rank) for rank in range(WORLD)])
        for u, v, gold in zip(z[:n], z[n:], golds):
            total = total + (net.relatedness(torch.cat([(u - v).abs(), u * v])) - gold).square().sum() / n
    else:
        z = [row / row.norm() for row in z]
        for i in range(n):
            others = torch.stack([z[i] @ z[n + j] / 0.05 for j in range(n)])
            total = total + (others.logsumexp(0) - others[i]) / n
    return total - 0.1 * sum(row.log_softmax(0)[t] for row, t in zip(logits, targets)) / len(targets)


@pytest.mark.parametrize("kind", ["stop", "none", "supervised"])
def test_two_processes_give_the_loss_and_gradients_of_one(two, kind):
    """The mean of the processes' losses and DDP's gradients are those of one forward pass of the whole batch."""
    net = ddp_net(kind)
    *x, targets = whole_batch()
    loss = slow_loss(net, kind, *net(*x), targets)
    loss.backward()
    assert sum(r[kind][0] for r in two).item() / WORLD == pytest.approx(loss.item(), rel=1e-5)
    for k, p in net.named_parameters():
        for r in two:
            torch.testing.assert_close(r[kind][1][k], p.grad, atol=2e-5, rtol=1e-4, msg=lambda m, k=k: f"{k}: {m}")
    assert all(p.grad.abs().max() > 0 for k, p in net.named_parameters() if not k.startswith("projector"))


def test_stop_gradient_matters_in_this_comparison(two):
    """Below the layer the kinds differ, so the test above would notice a lost detach; the loss is the same."""
    name = "lm.bert.embeddings.position_embeddings.weight"
    assert two[0]["stop"][0] == two[0]["none"][0]
    assert not torch.allclose(two[0]["stop"][1][name], two[0]["none"][1][name], atol=1e-4)


def test_torchrun_trains_to_one_processs_weights_and_one_writes(data, tmp_path):
    """Real torchrun without dropout, masking and augmentation: the weights after an epoch are those of one process
    with the whole batch, up to rounding; the folder is written once."""
    words = flags(data, "--dropout", 0, "--layer", "none", "--no-mlm", "--lr", 1e-2, "--eval-every", 0)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           S.__file__, *words, "--out", "runs/two"], cwd=tmp_path, text=True, capture_output=True,
                          timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one = S.main([*words, "--out", str(tmp_path / "runs" / "one")])
    two = report_of(tmp_path / "runs" / "two")
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"one", "two", "text"}
    assert done.stdout.count("steps an epoch") == 1 and done.stdout.count("encoder.pt") == 1
    assert json.loads((tmp_path / "runs/two/config.json").read_text())["processes"] == 2
    assert two["sts_untrained"] == pytest.approx(one["sts_untrained"], abs=1e-3)
    assert abs(two["sts"] - one["sts"]) < 0.5
    ours, theirs = (load(tmp_path / "runs" / name)["model"] for name in ("two", "one"))
    start = S.build(S.settings(words), S.load_config(S.settings(words)),
                    transformers.AutoTokenizer.from_pretrained(tmp_path / "runs/two/tokenizer"), CPU).state_dict()
    moved = off = 0.0
    for k, v in theirs.items():
        if not k.endswith("key.bias"):                               # softmax ignores it: its gradient is rounding
            moved, off = moved + (v - start[k]).square().sum(), off + (ours[k] - v).square().sum()
    assert off < 1e-3 * moved
    assert len(list((tmp_path / "runs" / "text").glob("tokens-*"))) == 1


# --- the default run --------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not os.environ.get("SLOW"), reason="the default run takes a minute: SLOW=1")
def test_the_default_run_learns_pairs_of_unseen_combinations(tmp_path, monkeypatch):
    """No flags: at least 15 points of Spearman above the untrained network, with Deep Augmentation (SLOW=1 to run)."""
    monkeypatch.chdir(tmp_path)
    report = S.main(["--device", "cpu", "--eval-every", "0"])
    assert report["layers_augmented"] == [8] and report["flags"]["stop_grad"] and report["flags"]["mlm"]
    assert report["unseen"] >= report["unseen_untrained"] + 15


# --- every option -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [
    "--layer none", "--layer 3", "--layer all", "--layer 1 2", "--no-stop-grad", "--transform channel",
    "--transform pca", "--transform pca --components 3", "--dropout 0", "--no-mlm", "--objective supervised",
    "--temperature 0.5", "--weight-decay 0.5", "--warmup 0", "--max-length 8", "--batch-size 8", "--pooler cls"])
def test_every_option_trains_and_changes_the_result(data, done, monkeypatch, tmp_path, more):
    """Finite loss and weights, and other weights than without the option. (Export and figures have their own tests.)"""
    monkeypatch.setattr(S, "export", lambda *_: 0.0)
    monkeypatch.setattr(S, "draw_figures", lambda *_: None)
    out = data / "runs" / "option"
    report = S.main(flags(data, *more.split(), "--out", out))
    state = load(out)["model"]
    shutil.rmtree(out)
    assert math.isfinite(report["loss"]) and math.isfinite(report["sts"])
    assert all(v.isfinite().all() for v in state.values()) and not same_bits(state, load(done)["model"])
    assert report["layers_augmented"] == {"none": [], "3": [3], "all": [0, 1, 2, 3], "1 2": [1, 2]}.get(
        more.removeprefix("--layer "), [2])


def test_rate_zero_without_stop_gradient_is_no_augmentation(data, monkeypatch):
    """--rate 0 --no-stop-grad is --layer none: the same bits, though rows are drawn."""
    monkeypatch.setattr(S, "export", lambda *_: 0.0)
    monkeypatch.setattr(S, "draw_figures", lambda *_: None)
    S.main(flags(data, "--dropout", 0, "--rate", 0, "--no-stop-grad", "--out", data / "runs/zero"))
    S.main(flags(data, "--dropout", 0, "--layer", "none", "--out", data / "runs/off"))
    assert same_bits(load(data / "runs/zero")["model"], load(data / "runs/off")["model"])


def test_init_starts_from_a_runs_weights_and_scores_them(data, done, tmp_path):
    """--init: --eval-only gives that run's scores; training starts at them, so they are the new run's "untrained"."""
    scores = S.main(flags(data, "--init", done, "--eval-only"))
    assert scores == {k: report_of(done)[k] for k in scores} and "sts" in scores
    report = S.main(flags(data, "--init", done, "--out", tmp_path / "run"))
    assert load(tmp_path / "run")["evals"]["0"]["dev"] == report_of(done)["dev"]
    assert report["sts_untrained"] == report_of(done)["sts"] and report["stretch"] is not None


def test_init_takes_the_weights_that_its_run_kept_and_leaves_missing_heads_new(data, done, tmp_path, capsys):
    """After --select dev those of best.pt; a pooler with an MLP that the run did not have: a new MLP, and said so."""
    run = shutil.copytree(done, tmp_path / "chosen")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state["model"], run / "best.pt")
    state["config"]["select"] = "dev"
    state["model"] = {k: torch.zeros_like(v) for k, v in state["model"].items()}
    torch.save(state, run / "checkpoint.pt")
    assert S.main(flags(data, "--init", run, "--eval-only"))["sts"] == report_of(done)["sts"]
    S.main(flags(data, "--init", run, "--eval-only", "--pooler", "cls"))
    assert "has no projector: new" in capsys.readouterr().out


def test_init_from_a_checkpoint_file_takes_the_tokenizer_beside_it(data, done, tmp_path):
    """--init RUN/checkpoint.pt with another text: the words must keep the numbers that the weights know."""
    other = write_text(tmp_path / "other.txt", seed=7)
    words = flags(data, "--train-file", other, "--out", tmp_path / "run", "--eval-only")
    assert S.main([*words, "--init", str(done / "checkpoint.pt")])["sts"] == report_of(done)["sts"]


def test_layer_auto_is_where_the_co_adapted_stretch_starts_or_ends(data, done, live, tmp_path, capsys):
    """--layer auto --init: the start of the stretch with stop-gradient, its end without (an exact CKA in one batch)."""
    from cka import coadapted_stretch, exact_map
    first, second, _ = S.load_sts(data / "sts")[1]["dev"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(done / "tokenizer")
    acts = []
    with torch.no_grad():
        for sentence in dict.fromkeys(first + second):               # one at a time: no padding at all
            ids = torch.tensor([tokenizer(sentence)["input_ids"]])
            acts.append([h[0].mean(0) for h in live.activations(ids, torch.ones_like(ids))[:-1]])
    acts = [torch.stack(rows) for rows in zip(*acts)]
    ours = S.layer_map(live, tokenizer, (first, second, None), CPU, output=False)
    torch.testing.assert_close(ours, exact_map([lambda batch: acts], [0]), atol=0.05, rtol=0)
    start, end = coadapted_stretch(ours)
    for stop_grad, layer in (("--stop-grad", start), ("--no-stop-grad", end)):
        report = S.main(flags(data, "--layer", "auto", "--init", done, stop_grad, "--out", tmp_path / stop_grad))
        assert report["layers_augmented"] == [layer] and f"so layer {layer}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def seeds(data):
    """--seeds 0 1 of the baseline: (folder, the table that main returned)."""
    out = data / "runs" / "none"
    return out, S.main(flags(data, "--layer", "none", "--seeds", 0, 1, "--out", out))


def test_seeds_give_mean_and_deviation_over_run_folders(seeds):
    out, table = seeds
    reports = [report_of(out / f"s{seed}") for seed in (0, 1)]
    assert [r["flags"]["seed"] for r in reports] == [0, 1]
    assert not same_bits(load(out / "s0")["model"], load(out / "s1")["model"])
    for key in ("sts", "sts_untrained", "dev", *TASKS):
        values = [r[key] for r in reports]
        assert table[key] == pytest.approx((statistics.mean(values), statistics.stdev(values)))


def test_compare_prints_one_table_and_draws_it(seeds, done, tmp_path, capsys):
    """Seeds are pooled, each kind of run is one row; unfinished and missing folders are left out and named."""
    runs = [shutil.copytree(seeds[0] / f"s{seed}", tmp_path / "none" / f"s{seed}") for seed in (0, 1)]
    runs.append(shutil.copytree(done, tmp_path / "base"))
    shutil.copytree(done, tmp_path / "unfinished", ignore=shutil.ignore_patterns("report.json"))
    table = S.main(["--compare", *map(str, runs), str(tmp_path / "unfinished"), str(tmp_path / "nowhere")])
    text = capsys.readouterr().out
    table = {Path(name).name: row for name, row in table.items()}
    assert set(table) == {"none", "base"} and table["none"]["seeds"] == 2 and table["base"]["seeds"] == 1
    assert table["none"]["sts"] == pytest.approx(seeds[1]["sts"]) and table["base"]["sts"][0] == report_of(done)["sts"]
    row = next(line for line in text.splitlines() if line.endswith("none"))
    assert f"{seeds[1]['sts'][0]:.2f} ± {seeds[1]['sts'][1]:.2f}" in row
    assert "unfinished: left out" in text and "nowhere: left out" in text
    drawn = (tmp_path / "none" / "compare.png").read_bytes()
    assert drawn.startswith(PNG[0]) and drawn.endswith(PNG[1])


def test_without_sts_dir_nothing_is_scored_and_the_run_ends_well(data, tmp_path, capsys):
    report = S.main([w for w in flags(data, "--out", tmp_path / "run") if w not in ("--sts-dir", str(data / "sts"))])
    assert "sts" not in report and math.isfinite(report["loss"]) and (tmp_path / "run" / "encoder.pt").exists()
    assert "nothing is scored" in capsys.readouterr().out


# --- text as it comes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["empty lines", "CRLF", "BOM", "no end", "spaces"])
def test_line_ends_and_empty_lines_change_nothing(data, monkeypatch, tmp_path, kind):
    """The same sentences in another dress train to the same bits."""
    monkeypatch.setattr(S, "export", lambda *_: 0.0)
    monkeypatch.setattr(S, "draw_figures", lambda *_: None)
    lines = (data / "text.txt").read_bytes().splitlines()
    dressed = {"empty lines": b"\n\n" + b"\n \n\t\n\n".join(lines) + b"\n\n\n", "CRLF": b"\r\n".join(lines) + b"\r\n",
               "BOM": b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n", "no end": b"\n".join(lines),
               "spaces": b"".join(b"  " + line + b" \t\n" for line in lines)}[kind]
    (tmp_path / "dressed.txt").write_bytes(dressed)
    results = []
    for file in (data / "text.txt", tmp_path / "dressed.txt"):
        S.main(flags(data, "--train-file", file, "--batch-size", 100, "--out", tmp_path / file.stem))
        results.append(load(tmp_path / file.stem))
    assert same_bits(results[0]["model"], results[1]["model"]) and results[0]["step"] == 3


def test_a_huge_line_is_cut_to_max_length(data, monkeypatch, tmp_path):
    """A line of 600 kB among the others is one sentence of 32 tokens, a word of 10,000 letters is one of three."""
    monkeypatch.setattr(S, "export", lambda *_: 0.0)
    monkeypatch.setattr(S, "draw_figures", lambda *_: None)
    text = (data / "text.txt").read_text()
    (tmp_path / "huge.txt").write_text(text + "the doctor examined the patient " * 20_000 + "\n" + "x" * 10_000 + "\n")
    report = S.main(flags(data, "--train-file", tmp_path / "huge.txt", "--out", tmp_path / "run"))
    starts = S.np.load(next((tmp_path / "text").glob("tokens-*/starts.npy")))
    lengths = (starts[1:] - starts[:-1]).tolist()
    assert len(lengths) == 302 and lengths[300:] == [32, 3] and math.isfinite(report["loss"])


# --- downloads, without a network ------------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface.co as a folder: what the script asks of huggingface_hub is copied from there, sizes told by it."""
    import tarfile
    import types

    import huggingface_hub
    there = tmp_path / "hub"
    write_sts(there / "any/downstream")
    (there / "any/downstream/MR").mkdir()
    (there / "any/downstream/MR/mr.txt").write_text("another task\n")
    write_text(there / "wiki1m_for_simcse.txt")
    with tarfile.open(there / "senteval.tar", "w") as tar:
        tar.add(there / "any", "any")
    sizes = {f: (there / f).stat().st_size for f in ("wiki1m_for_simcse.txt", "senteval.tar")}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda repo_id, filename, repo_type: filename)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: types.SimpleNamespace(size=sizes[url]))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / name))

    def get(repo_id, filename, repo_type, local_dir):
        Path(local_dir).mkdir(exist_ok=True)
        return shutil.copy(there / filename, local_dir)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", get)
    return sizes


def test_download_puts_things_where_the_papers_preset_looks(hub, capsys):
    """The text and the tasks, and of the archive only the tasks that are scored."""
    where = S.main(["--download"])
    a = S.settings(["--preset", "paper"])
    assert Path(a.train_file).read_text() == Path(where["wiki1m_for_simcse.txt"]).read_text()
    tasks, pairs = S.load_sts(Path(a.sts_dir))
    assert list(tasks) == TASKS and set(pairs) == {"dev", "train"}
    assert sorted(p.name for p in Path(a.sts_dir).iterdir()) == ["SICK", "STS"]
    assert "wiki1m_for_simcse.txt: data/wiki1m_for_simcse.txt" in capsys.readouterr().out


def test_a_truncated_download_is_refused(hub, capsys):
    hub["senteval.tar"] += 1
    with pytest.raises(SystemExit) as stopped:
        S.main(["--download"])
    assert stopped.value.code == 2 and "senteval.tar has" in capsys.readouterr().err


def test_no_network_is_one_line(hub, monkeypatch, capsys):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **_: open("no/route"))
    with pytest.raises(SystemExit) as stopped:
        S.main(["--download"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_editing_the_script_during_a_run_does_not_break_its_export(tmp_path, live):
    """TorchScript reads the source of Encoder at the end of a run; it must be the source that is running."""
    import importlib.util
    path = tmp_path / "edited.py"
    shutil.copy(S.__file__, path)
    spec = importlib.util.spec_from_file_location("edited", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path.write_text("# a line\n# and another\n" + path.read_text())
    ids, mask = S.random_sentences(live, 2, 5, False)
    with torch.no_grad():
        traced = torch.jit.trace_module(S.Traced(live).eval(), {"forward": (ids, mask), "activations": (ids, mask)},
                                        check_trace=False)
        assert torch.equal(torch.jit.script(module.Encoder(traced, 512))(ids, mask), live(ids, mask))
