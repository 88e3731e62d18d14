"""The table behind `auto`: which row wins, where rows come from, what damage does, and that tracing sees it."""

import json
import warnings

import pytest
import torch

from bench import bench_attention
from erdfast.ops import attention_table as table
from erdfast.ops.attention import ATTENTION_BACKENDS, attention, attention_qkv

CPU = torch.device("cpu")


@pytest.fixture
def user_rows(tmp_path, monkeypatch):
    """Write rows as this user's table."""
    monkeypatch.setenv("ERDFAST_CACHE", str(tmp_path))
    table.reload()

    def write(*rows):
        table.user_path().write_text(table.render_rows(rows))
        table.reload()

    yield write
    table.reload()


def row(backend, keys=32, head_width: int | str = 8, mode="any", dtype="float32", device="cpu"):
    fields = {"device": device, "dtype": dtype, "keys": keys, "head_width": head_width, "mode": mode}
    return fields | {"backend": backend}


def lookup(keys=18, head_width: int | None = 8, training=True, dtype=torch.float32):
    bucket = table.key_bucket(keys)
    assert bucket is not None
    return table.measured_backend(CPU, dtype, bucket, head_width, training)


def test_rows_may_name_every_backend_that_is_a_choice():
    assert set(table.TABLE_BACKENDS) == set(ATTENTION_BACKENDS) - {"reference"}


def test_constants_are_marked_as_pytorch_marks_them():
    def function() -> None:
        """Nothing."""

    assert vars(table.constant_when_traced(lambda: None)) == vars(torch.compiler.assume_constant_result(function))


def test_buckets():
    assert [table.key_bucket(n) for n in (1, 16, 17, 256, 258, 4096, 4097)] == [16, 16, 32, 256, 320, 4096, None]


def test_shipped_rows_are_valid_and_sorted():
    text = table.SHIPPED.read_text()
    assert text == table.render_rows(json.loads(text)["rows"])
    assert len(table.read_rows(table.SHIPPED)) == len(json.loads(text)["rows"])


def test_short_bf16_on_a_cpu(user_rows):
    """In training up to 64 keys, the plain products beat PyTorch's flash kernel there; in inference they do not."""
    rows = [lookup(n, dtype=torch.bfloat16, training=True) for n in (16, 17, 64, 65, 258)]
    assert rows == ["math", "math", "math", None, None]
    assert lookup(18, training=True) is None
    assert lookup(18, dtype=torch.bfloat16, training=False) is None
    for training in (True, False):
        qkv = [torch.randn(1, 1, 18, 8).bfloat16().requires_grad_(training) for _ in range(3)]
        with torch.profiler.profile() as profile:
            attention(*qkv)
        assert any("flash" in event.key for event in profile.key_averages()) != training


def test_users_rows_come_first_and_the_most_specific_wins(user_rows):
    user_rows(
        row("math", head_width="any"),
        row("flash", head_width=8),
        row("triton", head_width=8, mode="training"),
        row("flash", head_width="any", dtype="bfloat16"),
    )
    assert lookup(training=True) == "triton"
    assert lookup(training=False) == "flash"
    assert lookup(head_width=16) == lookup(head_width=None) == "math"
    assert table.table_head_widths() == (8, 72)  # the user's and ours
    assert lookup(keys=16) is None
    assert lookup(dtype=torch.bfloat16) == "flash"
    assert lookup(keys=64, dtype=torch.bfloat16) == "math"


def test_auto_runs_what_the_table_names(user_rows, monkeypatch):
    ran = []
    monkeypatch.setitem(ATTENTION_BACKENDS, "math", lambda q, k, v: ran.append("math") or q)
    user_rows(row("math", mode="training"))
    q = torch.randn(1, 1, 18, 8)
    attention(q, q, q)
    attention(q.requires_grad_(), q, q)
    with torch.no_grad():
        attention(q, q, q)
    assert ran == ["math"]


def test_auto_may_find_the_packed_kernel(user_rows):
    user_rows(row("triton"))
    qkv = torch.randn(1, 18, 3, 1, 8, requires_grad=True)
    found, wanted = attention_qkv(qkv), attention_qkv(qkv, backend="math")
    torch.testing.assert_close(found, wanted)
    assert found.grad_fn is not None
    assert "attention_qkv" in found.grad_fn.name()


def test_a_row_that_cannot_serve_is_told_once(user_rows):
    user_rows(row("efficient", dtype="float64"), row("flash_attn3"))
    q = torch.randn(1, 1, 18, 8)
    with pytest.warns(RuntimeWarning, match="'flash_attn3' for torch.float32 .* cannot be imported"):
        out = attention(q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q, q, q)
    torch.testing.assert_close(out, attention(q, q, q, backend="math"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"rows": [{"device": "cpu"}]}',
        table.render_rows([row("math")]).replace("math", "mth"),
        table.render_rows([row("math")]).replace("32, ", "33, "),
        '{"rows": 3}',
        b"\xff\xfe".decode("latin1"),
    ],
)
def test_a_damaged_table_is_named_once_and_ignored(user_rows, text):
    table.user_path().write_text(text, encoding="latin1")
    with pytest.warns(RuntimeWarning, match=f"{table.user_path()} cannot be read"):
        assert lookup() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(keys=17, dtype=torch.bfloat16) == "math"  # the shipped rows still count


def test_no_table_is_no_damage(user_rows, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup() is None
        table.reload()
        (tmp_path / "file").touch()
        monkeypatch.setenv("ERDFAST_CACHE", str(tmp_path / "file"))
        assert lookup() is None


def test_the_default_place_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("ERDFAST_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert table.user_path() == tmp_path / ".cache" / "erdfast" / "attention_table.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter must stand in on the CPU")
@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_look_ups(user_rows, dynamic):
    user_rows(row("math", head_width="any"), row("triton", keys=16))
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (18, 19, 16, 15, 40):
        q = torch.randn(1, 1, tokens, 8)
        torch.testing.assert_close(compiled(q, q, q), attention(q, q, q, backend="reference"))


def test_the_command_keeps_other_rows_and_damages_nothing(user_rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_attention, "default_device", lambda: "cpu")
    path = tmp_path / "rows.json"
    path.write_text(table.render_rows([row("triton", device="NVIDIA H200"), row("math", keys=16, mode="training")]))
    arguments = "--save-table --shapes 2x9x8 1x10x8 --batch 1 --rounds 1 --dtypes float32 --out"
    bench_attention.main([*arguments.split(), str(path)])
    rows = table.read_rows(path)
    assert capsys.readouterr().out.count("=>") == 2  # both shapes are one row in each mode
    assert rows["NVIDIA H200", "float32", 32, 8, "any"]["backend"] == "triton"
    for mode in table.MODES:
        measured = rows["cpu", "float32", 16, 8, mode]
        assert measured["shape"] == [1, 2, 9, 8]
        assert set(measured["ms"]) == {"auto", "flash", "math"}
    assert len(rows) == 3


def test_the_winner_must_be_ahead_of_pytorchs_choice():
    assert bench_attention.winner({"auto": 1.0, "flash": 0.99, "math": 2.0}) == "auto"
    assert bench_attention.winner({"auto": 1.0, "flash": 0.99, "triton": 0.8}) == "triton"


def test_a_wrong_answer_does_not_win(capsys):
    inputs = bench_attention.random_inputs(0, 1, bench_attention.Shape(1, 9, 8), torch.float32, "cpu")
    assert bench_attention.is_right("math", lambda q, k, v: attention(q, k, v, backend="math"), inputs)
    assert not bench_attention.is_right("half", lambda q, k, v: attention(q / 2, k, v), inputs)
    assert "half left out: off by" in capsys.readouterr().out
