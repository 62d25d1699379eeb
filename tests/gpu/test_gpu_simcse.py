"""What simcse_deepaug.py does differently on CUDA: no wait for the card in a step, bf16, the step
compiled with CUDA graphs, an encoder that moves. Without CUDA all is skipped."""
import json
from unittest import mock

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import simcse_deepaug as S

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run on CUDA, and its folder."""
    here = tmp_path_factory.mktemp("run")
    (here / "lines.txt").write_text("\n".join(S.Grammar().sentences(512)))
    words = ["--train-file", f"{here}/lines.txt", "--layer", "8", "--mlm", "--out", f"{here}/r"]
    return here / "r", S.main(words)

def parts(*words):
    """(settings, network on CUDA, data) of 512 sentences of the grammar."""
    a = S.settings(["--epochs", "900", "--eval-every", "0", *words])
    a.layer, a.seed, a.compile = a.layer[0], a.seed[0], bool(a.compile)
    sentences = S.Grammar().sentences(512)
    tokenizer = S.learn_tokenizer(sentences, 400)
    tokens = torch.from_numpy(tokenizer(sentences, padding="max_length", truncation=True, max_length=32,
                                        return_tensors="np")["input_ids"]).int()
    data = S.SimpleNamespace(tokens=tokens.to(CUDA), lengths=(tokens != 0).sum(1).numpy(),
                             scores=None, tokenizer=tokenizer)
    return a, S.build(a, tokenizer), data

def test_a_run_trains_and_exports_on_cuda(run):
    out, report = run
    assert report["steps"] == 8 and report["export_difference"] <= 1e-4
    assert json.loads((out / "config.json").read_text())["device"] == "cuda"

def test_the_exported_encoder_moves_to_cuda(run):
    encoder, ids = torch.jit.load(run[0] / "encoder.pt"), torch.randint(5, 100, (7, 32))
    mask = (torch.arange(32) < torch.tensor([[32], [3], [8], [31], [2], [16], [20]])).long()
    on_cpu = [encoder(ids, mask), *encoder.activations(ids, mask)]
    encoder.to("cuda")
    x = ids.to(CUDA), mask.to(CUDA)
    for ours, theirs in zip([encoder(*x), *encoder.activations(*x)], on_cpu, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)

def test_loss_and_gradient_equal_the_cpu():
    a, net, data = parts("--layer", "none", "--dropout", "0")
    results = []
    for device in (CUDA, torch.device("cpu")):
        net.to(device).zero_grad()
        ids = data.tokens[:16].repeat(2, 1).long().to(device)
        loss = S.simcse_loss(*net(ids, (ids != 0).long()).chunk(2), a.temperature)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in net.parameters()
                                                if p.grad is not None])))
    (loss, gradient), (same, same_gradient) = results
    assert loss == pytest.approx(same, rel=1e-3)
    assert (gradient - same_gradient).norm() <= 1e-2 * same_gradient.norm() + 1e-6

class Enough(Exception):
    pass

@pytest.mark.parametrize("words", [
    "--layer 8 --stop-grad --mlm", "--layer all --transform channel", "--layer 8 --mlm --compile",
    "--layer 0 --compile"])
def test_a_training_step_never_waits_for_the_gpu(words, tmp_path):
    """train() itself, after the first epoch, in which graphs are captured; log lines, which wait,
    are every 50th step: steps 52 to 56, none of which starts an epoch."""
    a, net, data = parts(*words.split())
    steps = []

    def after_step(*_):
        steps.append(1)
        if len(steps) == 51:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        if len(steps) == 55:
            raise Enough
    hook = register_optimizer_step_post_hook(after_step)
    try:
        with mock.patch.object(S, "save_checkpoint"), pytest.raises(Enough):
            S.train(a, net, data, tmp_path, {}, lambda tests: {}, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()
    assert all(w.isfinite().all() for w in net.parameters())

def test_compiled_training_learns_what_eager_training_does(tmp_path):
    """Without any dropout both see the same batches: the losses agree to bf16's precision."""
    losses = []
    for words in ("--no-compile", "--compile"):
        a, net, data = parts("--layer", "none", "--dropout", "0", words, "--lr", "3e-4")
        a.epochs = 3
        state = S.train(a, net, data, tmp_path, {}, lambda tests: {}, None)
        losses.append([row["loss"] for row in state["log"]])
    assert losses[0][-1] < losses[0][0] - 0.3
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.05)
