"""Each example, run with a tiny model; those that ask a server ask one of a tiny model."""

import json
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_encoder
from live_server import LiveServer, serve

from arctic_jax.config import EngineConfig
from arctic_jax.engine.core import EngineCore
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.testing import TINY_LLAMA, write_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY_SWIFTKV = TINY_LLAMA | {
    "architectures": ["LlamaSwiftKVForCausalLM"],
    "model_type": "llama_swiftkv",
    "swiftkv": True,
    "num_key_value_layers": 1,
}
MODELS = {
    "generate": TINY_LLAMA,
    "chat_stream": TINY_LLAMA,
    "speculative": TINY_LLAMA,
    "swiftkv": TINY_SWIFTKV,
}
OF_A_SERVER = {"openai_client.py", "curl.sh"}


def run(name: str, argument: str) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](argument)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = str(write_model(tmp_path_factory.mktemp("tiny")))
    core = EngineCore(
        EngineConfig.from_keywords(model=model, max_num_seqs=2, max_num_batched_tokens=64)
    )
    engine = AsyncEngine(engine=core)
    with serve(engine) as server:
        yield server
    engine.shutdown()


def test_every_example_is_run_here():
    found = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert found == {f"{name}.py" for name in (*MODELS, "embed")} | OF_A_SERVER


@pytest.mark.parametrize(
    "name",
    [name if name == "generate" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_an_example_generates(name, tmp_path, capsys):
    run(name, str(write_model(tmp_path / "model", MODELS[name])))
    lines = capsys.readouterr().out.splitlines()
    if name == "generate":
        assert ["->" in line for line in lines[:3]] == [True] * 3
        assert [line[:2] for line in lines[-3:]] == ["0:", "1:", "2:"]
    elif name == "speculative":
        first, again = (float(line.split()[-4]) for line in lines)
        assert again > first >= 1  # the answer was known
    elif name == "swiftkv":
        assert [line.split(" (")[0] for line in lines] == [
            "What is gravity?",
            "What is the capital of Italy?",
        ]
    else:
        assert "".join(lines).strip()


def test_the_example_that_embeds(tmp_path, capsys):
    run("embed", str(tiny_encoder.write(tmp_path / "model")))
    scores = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert all(-1 <= score <= 1.001 for score in scores)


def test_the_openai_client(live, capsys):
    run("openai_client", live.url)
    whole, streamed = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    assert whole.rsplit(" ", 1)[0] == streamed


def test_curl(live):
    done = subprocess.run([EXAMPLES / "curl.sh", live.url], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, models, completion, stream = re.split(
        r"^(?:models|a completion|a chat.*):$", done.stdout, flags=re.M
    )
    assert json.loads(models)["data"][0]["id"] == "tiny"
    assert json.loads(completion)["usage"]["completion_tokens"] <= 8
    events = [line for line in stream.splitlines() if line]
    assert all(line.startswith("data: ") for line in events)
    assert events[-1] == "data: [DONE]"
