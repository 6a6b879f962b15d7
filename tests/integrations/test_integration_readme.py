"""The README's TRL example runs as printed, except for a tiny model and a few steps."""

import re
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed")
from iris_kernels import integrations
from iris_kernels.integrations import trl as ours
from tiny_trl import make_model, make_tokenizer

README = Path(__file__).parent.parent.parent / "README.md"


@pytest.fixture(autouse=True)
def unpatched():
    yield
    integrations.unpatch_trl(quiet=True)


def test_the_trl_example(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = README.read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- trl example -->\n```python\n(.*?)```", text, re.DOTALL)
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for printed, here in (
        ('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(tmp_path / "model"))),
        ('"runs/self-certainty"', repr(str(tmp_path / "run"))),
        ("max_completion_length=128", "max_completion_length=4, max_steps=2, use_cpu=True, "
         'bf16=False, report_to="none", save_strategy="no", logging_steps=1'),
    ):  # fmt: skip
        assert code.count(printed) == 1
        code = code.replace(printed, here)
    calls = []
    linear = ours.linear_token_stats
    monkeypatch.setattr(
        ours, "linear_token_stats", lambda *a, **k: calls.append(1) or linear(*a, **k)
    )
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    logged = scope["trainer"].state.log_history
    assert sum("rewards/self_certainty/mean" in line for line in logged) == 2
    assert calls
