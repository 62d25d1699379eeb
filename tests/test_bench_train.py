"""tests/bench/bench_train.py: what it counts and how it divides the time, on cases small enough to know."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
import bench_train as B  # noqa: E402

CPU = torch.device("cpu")


def test_work_counts_operations_and_bytes_of_forward_and_backward():
    x, w = torch.randn(8, 16), torch.randn(16, 4, requires_grad=True)
    with B.Work() as work:
        y = (x @ w).view(2, 16)                                     # a view moves nothing
        y.relu().sum().backward()
    by_name = {}
    for name, flops, moved in work.rows:
        by_name.setdefault(name, []).append((flops, moved))
    product = 2 * 8 * 16 * 4                                        # forward, and the weights' gradient
    assert [f for f, _ in by_name["mm"]] == [product, product]
    assert by_name["mm"][0][1] == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert by_name["relu"] == [(0, 4 * 2 * 32)] and "view" not in by_name and "t" not in by_name
    rates = 1e9, 1e6                                                # here every operator is bound by its bytes
    assert B.floor_seconds(work.rows, *rates) == pytest.approx(sum(m for *_, m in work.rows) / 1e6)
    assert B.floor_seconds([("mm", 2e9, 1e6)], *rates) == 2


def test_an_expanded_tensor_is_read_once():
    x = torch.randn(4, 1).expand(4, 1000)
    with B.Work() as work:
        x.neg()
    assert work.rows == [("neg", 0, 4 * 4 + 4 * 4000)]


def test_time_belongs_to_the_innermost_span(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(B.time, "perf_counter", lambda: next(now) ** 2 / 1000)
    marks = B.Marks(CPU)
    marks.mark(None)                                                # 0: the stretch begins
    inner = marks.around("forward", lambda: None)
    marks.around("loss", inner)()                                   # 1 loss, 4 forward, 9 back in loss, 16 out of it
    marks.mark("optimizer")                                         # 25
    marks.mark(None)                                                # 36
    parts = marks.milliseconds(1)
    assert {k: round(v, 6) for k, v in parts.items() if v} == {"rest": 1 + 9, "loss": 3 + 7, "forward": 5,
                                                               "optimizer": 11}


def test_a_scripts_own_training_is_measured_and_ends():
    training = B.Training("simclr", CPU, ["--batch-size", "16"], small=True)
    assert training.a.batch_size == 16 and len(training.speed(1, 2)) == 2
    parts = training.parts(2)
    assert set(parts) == set(B.PARTS) and all(parts[p] > 0 for p in parts)
    assert parts["backward"] > parts["loss"]
    flops = sum(row[1] for row in training.work())
    assert flops > 3 * 32 * 1e6                                     # 32 views, some 8 MFLOP each, three times


def test_a_row_that_fails_costs_no_other(capsys):
    for error in (ValueError("broken\nbadly"), AssertionError(), SystemExit(2)):
        with B.survived("simclr", "compiled") as ended:
            raise error
        assert ended == [error] and "simclr      compiled  failed: " in capsys.readouterr().out
    with B.survived("simclr", "") as ended:
        pass
    assert ended == []


def test_what_a_script_says_before_it_leaves_is_shown(capsys):
    with pytest.raises(SystemExit):
        B.Training("simclr", CPU, ["--rate", "2"], small=True)
    assert "--rate" in capsys.readouterr().out
