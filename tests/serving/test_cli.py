"""The command line, with an engine that answers from a script."""

import json
import logging
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar, cast

import pytest
from typer.testing import CliRunner

from arctic_jax import LLM, RequestOutput, SamplingParams
from arctic_jax.config import LoadConfig
from arctic_jax.errors import InvalidRequestError
from arctic_jax.loading.model_files import open_model
from arctic_jax.loading.orbax_checkpoint import OrbaxCheckpoint
from arctic_jax.request import CompletionOutput, RequestMetrics
from arctic_jax.serving import cli, options
from arctic_jax.testing import TINY_LLAMA, write_model


class FakeLLM:
    """Answers every prompt with "one two three", a word a token."""

    made: ClassVar[list["FakeLLM"]] = []
    answer = ("one", " two", " three")
    error: str | None = None
    engine = SimpleNamespace(step_logs=())

    def __init__(self, **keywords):
        self.keywords = keywords
        self.seen = []
        self.closed = 0
        FakeLLM.made.append(self)

    def get_tokenizer(self):
        return range(50)

    def get_default_sampling_params(self):
        return SamplingParams(temperature=0.7, top_k=5)

    def generate(self, prompts, params, use_tqdm=True):
        self.seen.append((prompts, params))
        return [self._output(str(i), prompt, 3) for i, prompt in enumerate(prompts)]

    def stream(self, messages, params):
        self.seen.append(([dict(m) for m in messages], params))
        if len(messages[-1]["content"]) > 100:
            raise InvalidRequestError("the prompt is too long", "prompt")
        try:
            for words in range(1, 4):
                yield self._output("0", "", words)
        finally:
            self.closed += 1

    def _output(self, request_id, prompt, words):
        text = "".join(self.answer[:words])
        ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else [1, 2]
        answer = CompletionOutput(
            0, text, list(range(words)), finish_reason="stop", error=self.error
        )
        times = RequestMetrics(arrival_time=0.0, first_token_time=0.1, last_token_time=0.5)
        shown = prompt if isinstance(prompt, str) else None
        return RequestOutput(request_id, shown, ids, [answer], words == 3, metrics=times)


@pytest.fixture(autouse=True)
def llm(monkeypatch):
    FakeLLM.made = []
    monkeypatch.setattr(FakeLLM, "answer", FakeLLM.answer)
    monkeypatch.setattr("arctic_jax.llm.LLM", FakeLLM)
    return FakeLLM


def run(*arguments, **keywords):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], **keywords)


def test_generate_prints_prompt_and_answer():
    result = run("generate", "-p", "zero ", "-p", "null ")
    assert result.exit_code == 0, result.output
    assert result.stdout == "zero one two three\nnull one two three\n"
    assert "6 tokens in" in result.stderr


def test_generate_is_greedy_unless_told_and_keeps_the_models_other_defaults():
    run("generate", "-p", "a")
    run("generate", "-p", "a", "--temperature", 1, "--top-p", 0.5, "--stop", "x", "--seed", 3)
    (_, first), (_, second) = (made.seen[0] for made in FakeLLM.made)
    assert (first.temperature, first.top_k, first.max_tokens, first.seed) == (0, 5, 128, None)
    assert (second.temperature, second.top_p, second.stop, second.seed) == (1, 0.5, ["x"], 3)


def test_generate_json_is_one_object_a_prompt():
    result = run("generate", "-p", "a", "-p", "b", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "b"]
    assert rows[0]["outputs"][0]["text"] == "one two three"


def test_generate_reads_prompts_from_a_file_and_from_standard_input(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a\n\nb\n")
    assert run("generate", "--prompts-file", file).stdout.startswith("aone")
    run("generate", "--prompts-file", "-", input="c\nd")
    assert [made.seen[0][0] for made in FakeLLM.made] == [["a", "b"], ["c", "d"]]


def test_a_model_cannot_steer_the_terminal(llm, monkeypatch):
    monkeypatch.setattr(llm, "answer", ("\x1b[31m", "red", "\x9b"))
    assert run("generate", "-p", "a").stdout == "a[31mred\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate",), "nothing to do"),
        (("generate", "-p", "a", "--temperature", -1), "temperature must be non-negative, got -1"),
        (("generate", "--prompts-file", "/nowhere/prompts"), "/nowhere/prompts"),
        (("bench", "throughput", "--dataset-name", "sharegpt"), "'sharegpt'"),
        (("bench", "throughput", "--dataset-name", "custom"), "--dataset-path"),
        (("bench", "throughput", "--dataset-path", "a.jsonl"), "a.jsonl"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert run(*arguments, "--debug").exit_code == 1  # the traceback


def test_a_bad_value_is_found_before_the_model_is_loaded():
    run("generate", "-p", "a", "--temperature", -1)
    run("chat", "--top-p", 7)
    assert FakeLLM.made == []


def test_a_failed_request_is_an_error(llm, monkeypatch):
    monkeypatch.setattr(llm, "error", "not a number in the logits")
    for command in (("generate", "-p", "a"), ("bench", "latency", "--num-iters", 1)):
        result = run(*command)
        assert result.exit_code == 2
        assert "not a number in the logits" in result.stderr


def test_engine_options_reach_the_engine_in_every_command():
    given = "--model m --dtype float32 --max-model-len 99 --num-blocks 7 --no-prefix-caching"
    given += " --tensor-parallel-size 2 --ulysses-sequence-parallel-size 4 --implementation xla"
    for command in (
        ("generate", "-p", "a"),
        ("chat",),
        ("bench", "latency", "--num-iters", 1, "--num-iters-warmup", 0),
        ("bench", "throughput", "--num-prompts", 2),
    ):
        result = run(*command, *given.split(), input="")
        assert result.exit_code == 0, result.output
        keywords = FakeLLM.made[-1].keywords
        assert keywords["model"] == "m"
        assert keywords["max_model_len"] == 99
        assert keywords["num_blocks"] == 7
        assert keywords["enable_prefix_caching"] is False
        assert keywords["tensor_parallel_size"] == 2
        assert keywords["ulysses_sequence_parallel_size"] == 4
        assert keywords["implementation"] == "xla"


def test_the_engine_knows_every_option():
    keywords = options.engine_options()
    from arctic_jax import EngineConfig

    config = EngineConfig.from_keywords(**keywords)
    assert config == EngineConfig()


def test_chat_keeps_history_until_reset():
    result = run("chat", "--system", "be brief", input="hi\nmore\n/reset\nagain\n/exit\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("one two three") == 3
    system = {"role": "system", "content": "be brief"}
    answer = {"role": "assistant", "content": "one two three"}
    hi, more, again = ({"role": "user", "content": w} for w in ("hi", "more", "again"))
    seen = [messages for messages, _ in FakeLLM.made[0].seen]
    assert seen == [[system, hi], [system, hi, answer, more], [system, again]]
    assert FakeLLM.made[0].seen[0][1].max_tokens is None


def test_chat_survives_a_refused_message():
    result = run("chat", input="x" * 101 + "\nhi\n")
    assert result.exit_code == 0
    assert "error: the prompt is too long" in result.stderr
    assert FakeLLM.made[0].seen[1][0] == [{"role": "user", "content": "hi"}]


def test_ctrl_c_ends_an_answer_and_the_request(monkeypatch, capsys):
    llm = FakeLLM()
    whole = FakeLLM.stream

    def interrupted(self, messages, params):
        for output in whole(self, messages, params):
            os.kill(os.getpid(), signal.SIGINT)
            yield output

    monkeypatch.setattr(FakeLLM, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert (
        cli._reply(cast(LLM, llm), [{"role": "user", "content": "hi"}], SamplingParams()) == "one"
    )
    assert capsys.readouterr().out == "one\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_leaves_the_second_time(monkeypatch):
    keys = iter([KeyboardInterrupt, "hi", KeyboardInterrupt, KeyboardInterrupt, "never"])

    def typed(prompt):
        key = next(keys)
        if key is KeyboardInterrupt:
            raise key
        return key

    monkeypatch.setattr("builtins.input", typed)
    assert list(cli._lines()) == ["hi"]


def test_latency_writes_vllms_keys(tmp_path):
    file = tmp_path / "folder" / "latency.json"
    result = run(
        *("bench", "latency", "--batch-size", 2, "--input-len", 4, "--output-len", 3),
        *("--num-iters", 3, "--num-iters-warmup", 1, "--output-json", file),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert len(report["latencies"]) == 3
    assert report["avg_latency"] > 0
    assert set(report["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert report["environment"]["versions"]["jax"]
    assert report["environment"]["devices"]
    (llm,) = FakeLLM.made
    assert len(llm.seen) == 4
    prompts, params = llm.seen[0]
    assert [len(p["prompt_token_ids"]) for p in prompts] == [4, 4]
    assert (params.max_tokens, params.ignore_eos) == (3, True)
    assert llm.keywords["enable_prefix_caching"] is False


def test_throughput_of_random_and_of_own_prompts(tmp_path):
    file, data = tmp_path / "throughput.json", tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "output_tokens": 9}\n\n{"prompt": "b"}\n')
    sizes = ["--num-prompts", "5", "--input-len", "6", "--output-len", "3", "--output-json"]
    run("bench", "throughput", *sizes, file)
    report = json.loads(file.read_text())
    assert report["num_requests"] == 5
    assert report["total_num_tokens"] == 5 * (6 + 3)
    assert report["requests_per_second"] == pytest.approx(5 / report["elapsed_time"])
    assert report["tokens_per_second"] == pytest.approx(45 / report["elapsed_time"])
    assert report["mean_ttft_ms"] == pytest.approx(100)
    assert report["p99_tpot_ms"] == pytest.approx(200)
    own = ("--dataset-name", "custom", "--dataset-path", data)
    result = run("bench", "throughput", *own)
    assert result.exit_code == 0, result.output
    _, params = FakeLLM.made[1].seen[0]
    assert [p.max_tokens for p in params] == [9, 128]


def test_models_and_env():
    shown = run("models", "list").stdout
    assert "smollm2-135m-instruct" in shown
    assert "LlamaForCausalLM" in shown
    report = json.loads(run("env", "--json").stdout)
    assert report["devices"][0]["platform"] == "cpu"
    assert report["versions"]["arctic_jax"]
    assert "compiled programs" in run("env").stdout


def test_help_answers_at_once_and_loads_no_jax():
    """Half a second is the promise; of the processor's time, as others may use the machine, too."""
    code = (
        "import sys; sys.argv = ['arctic-jax', '--help']\n"
        "from arctic_jax.serving import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'help imports {heavy}' if heavy else 0)\n"
    )
    seconds = []
    for _ in range(2):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        user = after.children_user - before.children_user
        seconds.append(user + after.children_system - before.children_system)
    assert min(seconds) < 1.0


def test_convert_makes_a_model_that_can_be_opened(tmp_path):
    """In a process of its own, since it sets JAX's devices."""
    write_model(tmp_path / "model", TINY_LLAMA)
    command = [sys.executable, "-m", "arctic_jax.serving.cli", "convert"]
    command += [str(tmp_path / "model"), str(tmp_path / "out"), "--dtype", "bfloat16"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "100 %" in done.stderr
    assert f"generate --model {tmp_path / 'out'}" in done.stderr
    files = open_model(LoadConfig(model=str(tmp_path / "out")))
    assert isinstance(files.checkpoint, OrbaxCheckpoint)
    assert files.checkpoint.manifest.dtype == files.config["dtype"] == "bfloat16"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "already exists" in again.stderr


def test_convert_knows_one_format(tmp_path):
    result = run("convert", tmp_path, tmp_path / "out", "--to", "zarr")
    assert result.exit_code == 2
    assert "--to must be orbax, got 'zarr'" in result.stderr


def test_what_the_engine_logs_is_shown(capsys):
    log = logging.getLogger("arctic_jax.engine")
    try:
        options.show_log()
        logging.getLogger("arctic_jax.engine.runner").info("loaded %.2f GB of weights", 1.5)
        assert capsys.readouterr().err.strip() == "loaded 1.50 GB of weights"
    finally:
        log.handlers.clear()
        log.setLevel(logging.NOTSET)
        log.propagate = True
