"""`arctic-jax bench serve`: latency and throughput of a server, ours or any with OpenAI's API.

Flags and the JSON's keys are those of `vllm bench serve`.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arctic_jax.serving import bench_datasets
from arctic_jax.serving.bench_datasets import Call

if TYPE_CHECKING:
    import httpx2

ENDPOINTS = {
    "vllm": "/v1/completions",
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
"""What each of vLLM's names for a backend calls."""
_SERVICE_LEVELS = ("ttft", "tpot", "e2el")


@dataclass
class Answer:
    """What became of a call; times in seconds."""

    success: bool = False
    error: str = ""
    started: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    e2el: float = 0.0
    prompt_len: int = 0
    output_len: int = 0

    @property
    def tpot(self) -> float | None:
        """Time of a token after the first; `None` if there is no such token."""
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None


def bench_serve(
    base_url: Annotated[
        str | None, typer.Option(help="Of the server, instead of host and port.")
    ] = None,
    host: Annotated[str, typer.Option(help="Of the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the server.")] = 8000,
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(ENDPOINTS)}.")] = "openai",
    endpoint: Annotated[
        str | None,
        typer.Option(help="/v1/completions or /v1/chat/completions; by default the backend's."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="By default the first served.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=["ARCTIC_JAX_API_KEY", "OPENAI_API_KEY"])
    ] = None,
    dataset_name: Annotated[str, typer.Option(help="random, sonnet, custom or trace.")] = "random",
    dataset_path: Annotated[Path | None, typer.Option(help="Its file.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many calls.")] = 1000,
    input_len: Annotated[
        int, typer.Option("--random-input-len", "--input-len", min=1, help="Tokens of a prompt.")
    ] = 1024,
    output_len: Annotated[
        int, typer.Option("--random-output-len", "--output-len", min=1, help="... of an answer.")
    ] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(min=0, max=0.99, help="Lengths vary by this share.")
    ] = 0.0,
    random_prefix_len: Annotated[
        int, typer.Option(min=0, help="Tokens that all random prompts share.")
    ] = 0,
    request_rate: Annotated[float, typer.Option(help="Calls a second; inf: all at once.")] = float(
        "inf"
    ),
    burstiness: Annotated[float, typer.Option(help="1: Poisson; less: bursts; more: even.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Calls at once.")] = None,
    num_warmups: Annotated[int, typer.Option(min=0, help="Calls that are not counted.")] = 1,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Answers of full length.")
    ] = True,
    temperature: Annotated[float | None, typer.Option(help="Of sampling.")] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Of what percentiles are shown.")
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Which ones.")] = "99",
    goodput: Annotated[
        list[str] | None, typer.Option(help="Such as ttft:200, in ms; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write a JSON file.")] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="... with every call in it.")
    ] = False,
    result_dir: Annotated[Path, typer.Option(help="Where to.")] = Path("."),
    result_filename: Annotated[str | None, typer.Option(help="Under which name.")] = None,
) -> None:
    """Measure a running server under a load."""
    from arctic_jax.serving.bench import show
    from arctic_jax.serving.options import stderr

    if request_rate <= 0 or burstiness <= 0:
        raise ValueError(f"{request_rate=} and {burstiness=} must be positive")
    if backend not in ENDPOINTS:
        raise ValueError(f"{backend=} is none of {', '.join(ENDPOINTS)}")
    levels = _service_levels(goodput or [])
    percentiles = [float(p) for p in metric_percentiles.split(",")]
    chosen = percentile_metrics.split(",")
    url = (base_url or f"http://{host}:{port}").rstrip("/")
    load = _Load(url, endpoint or ENDPOINTS[backend], api_key, ignore_eos, temperature)
    load.model = model or load.first_model()
    calls = bench_datasets.make_calls(
        dataset_name,
        num_prompts,
        input_len,
        output_len,
        path=dataset_path,
        range_ratio=random_range_ratio,
        prefix_len=random_prefix_len,
        seed=seed,
        tokenize=load.tokenize,
    )
    times = bench_datasets.arrivals(calls, request_rate, burstiness, seed)
    answers, duration = asyncio.run(load.run(calls, times, max_concurrency, num_warmups))
    results = summarize(answers, duration, levels, percentiles, chosen)
    show(f"Serving: {len(calls)} calls of {dataset_name}", _rows(results))
    if results["failed"]:
        stderr.print(f"[bold red]{next(a.error for a in answers if not a.success)[:300]}[/]")
    if not (save_result or save_detailed):
        return
    report = _settings(load, dataset_name, calls, request_rate, burstiness, max_concurrency)
    report |= results
    if save_detailed:
        report |= _details(answers)
    name = result_filename or f"{load.model.replace('/', '-')}-{report['date']}.json"
    result_dir.mkdir(parents=True, exist_ok=True)
    (result_dir / name).write_text(json.dumps(report, indent=1) + "\n", "utf-8")


class _Load:
    """Sends calls and takes the times of what comes back."""

    def __init__(
        self,
        base_url: str,
        endpoint: str,
        api_key: str | None,
        ignore_eos: bool,
        temperature: float | None,
    ) -> None:
        self.base_url = base_url
        self.endpoint = endpoint
        self.model = ""
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._ignore_eos = ignore_eos
        self._temperature = temperature

    def first_model(self) -> str:
        """Ask the server what it serves."""
        return self._ask("GET", "/v1/models")["data"][0]["id"]

    def tokenize(self, text: str) -> Sequence[int]:
        """Ask the server for a text's tokens."""
        return self._ask("POST", "/tokenize", {"model": self.model, "prompt": text})["tokens"]

    async def run(
        self,
        calls: Sequence[Call],
        times: Sequence[float],
        max_concurrency: int | None,
        num_warmups: int,
    ) -> tuple[list[Answer], float]:
        """Send all calls at their times; return what became of them, and how long it took."""
        import httpx2

        room = asyncio.Semaphore(max_concurrency or len(calls))
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx2.AsyncClient(
            base_url=self.base_url, headers=self._headers, timeout=None, limits=limits
        ) as client:
            for _ in range(num_warmups):
                answer = await self._send(client, calls[0])
                if not answer.success:
                    raise ValueError(f"the first call has failed: {answer.error}")
            start = time.perf_counter()

            async def send_at(call: Call, when: float) -> Answer:
                await asyncio.sleep(start + when - time.perf_counter())
                async with room:
                    return await self._send(client, call)

            pairs = zip(calls, times, strict=True)
            answers = await asyncio.gather(*(send_at(call, when) for call, when in pairs))
            return answers, time.perf_counter() - start

    async def _send(self, client: "httpx2.AsyncClient", call: Call) -> Answer:
        import httpx2

        answer = Answer(prompt_len=call.prompt_len or 0)
        answer.started = last = time.perf_counter()
        try:
            async with client.stream("POST", self.endpoint, json=self._body(call)) as response:
                if response.status_code != 200:
                    answer.error = (await response.aread()).decode("utf-8", "replace")
                    return answer
                async for line in response.aiter_lines():
                    event = line.removeprefix("data:").strip()
                    if not event or event.startswith(":") or event == "[DONE]":
                        continue
                    now = time.perf_counter()
                    if self._take(answer, json.loads(event)):
                        if answer.ttft:
                            answer.itl.append(now - last)
                        else:
                            answer.ttft = now - answer.started
                        last = now
        except (httpx2.HTTPError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"
            return answer
        answer.e2el = last - answer.started
        answer.success = not answer.error and answer.ttft > 0
        answer.error = answer.error or ("" if answer.success else "no token came")
        return answer

    def _take(self, answer: Answer, event: dict[str, Any]) -> bool:
        """Take an event; return whether tokens came with it."""
        if "error" in event:
            answer.error = str(event["error"])
        if event.get("usage"):
            answer.output_len = event["usage"]["completion_tokens"]
            answer.prompt_len = event["usage"]["prompt_tokens"]
        for choice in event.get("choices", ()):
            delta = choice.get("delta")
            # A chat's first chunk has a role and no token; text may lag behind its tokens.
            if delta is None or any(delta.get(k) for k in ("content", "reasoning", "tool_calls")):
                return True
        return False

    def _body(self, call: Call) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": call.output_len,
        }
        if self._ignore_eos:
            body["ignore_eos"] = True
        if self._temperature is not None:
            body["temperature"] = self._temperature
        if not self.endpoint.endswith("/chat/completions"):
            return body | {"prompt": call.prompt}
        text = call.prompt if isinstance(call.prompt, str) else self._detokenize(call.prompt)
        return body | {"messages": [{"role": "user", "content": text}]}

    def _detokenize(self, tokens: list[int]) -> str:
        return self._ask("POST", "/detokenize", {"model": self.model, "tokens": tokens})["prompt"]

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        import httpx2

        try:
            response = httpx2.request(
                method, self.base_url + path, json=body, headers=self._headers, timeout=30.0
            )
        except httpx2.HTTPError as error:
            raise ValueError(f"{self.base_url} does not answer: {error}") from error
        if response.status_code != 200:
            raise ValueError(f"{path} answers {response.status_code}: {response.text[:300]}")
        return response.json()


def summarize(
    answers: Sequence[Answer],
    duration: float,
    levels: dict[str, float],
    percentiles: Sequence[float],
    chosen: Sequence[str],
) -> dict[str, Any]:
    """Make the figures of `vllm bench serve`, times in milliseconds.

    Args:
        answers: of all calls.
        duration: of all together, seconds.
        levels: milliseconds that a good call may take, by what is measured.
        percentiles: which ones.
        chosen: of what there are percentiles beside the 99th.
    """
    import numpy as np

    good = [answer for answer in answers if answer.success]
    outputs = sum(answer.output_len for answer in good)
    inputs = sum(answer.prompt_len for answer in good)
    values = {
        "ttft": [answer.ttft for answer in good],
        "tpot": [tpot for answer in good if (tpot := answer.tpot) is not None],
        "itl": [gap for answer in good for gap in answer.itl],
        "e2el": [answer.e2el for answer in good],
    }
    results: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / duration,
        "request_goodput": _num_within(good, levels) / duration if levels else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_output_tokens_per_s": _most_tokens_a_second(good),
        "max_concurrent_requests": _most_at_once(good),
    }
    for name, seconds in values.items():
        milliseconds = np.array(seconds or [0.0]) * 1e3
        wanted: dict[str, Callable[[Any], Any]] = {
            "mean": np.mean,
            "median": np.median,
            "std": np.std,
        }
        for kind, function in wanted.items():
            results[f"{kind}_{name}_ms"] = float(function(milliseconds))
        for p in {99.0, *(percentiles if name in chosen else ())}:
            results[f"p{p:g}_{name}_ms"] = float(np.percentile(milliseconds, p))
    return results


def _num_within(answers: Sequence[Answer], levels: dict[str, float]) -> int:
    def within(answer: Answer) -> bool:
        times = {name: getattr(answer, name) or 0.0 for name in levels}
        return all(times[name] * 1e3 <= most for name, most in levels.items())

    return sum(map(within, answers))


def _most_tokens_a_second(answers: Sequence[Answer]) -> float:
    """Tokens of the second in which most came; a chunk's tokens count as one if drafts came."""
    if not answers:
        return 0.0
    begin = min(answer.started for answer in answers)
    seconds: dict[int, float] = {}
    for answer in answers:
        moment = answer.started + answer.ttft
        tokens = answer.output_len / (len(answer.itl) + 1)
        for gap in (0.0, *answer.itl):
            moment += gap
            second = int(moment - begin)
            seconds[second] = seconds.get(second, 0.0) + tokens
    return max(seconds.values())


def _most_at_once(answers: Sequence[Answer]) -> int:
    changes = [(a.started, 1) for a in answers] + [(a.started + a.e2el, -1) for a in answers]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def _service_levels(given: Sequence[str]) -> dict[str, float]:
    """Read `ttft:200`, several in one string or each in its own."""
    levels: dict[str, float] = {}
    for one in " ".join(given).split():
        name, _, most = one.partition(":")
        try:
            levels[name] = float(most)
        except ValueError:
            raise ValueError(f"--goodput must be like ttft:200, got {one!r}") from None
        if name not in _SERVICE_LEVELS:
            raise ValueError(f"--goodput knows {', '.join(_SERVICE_LEVELS)}, got {one!r}")
    return levels


def _settings(
    load: _Load,
    dataset_name: str,
    calls: Sequence[Call],
    request_rate: float,
    burstiness: float,
    max_concurrency: int | None,
) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if "chat" in load.endpoint else "openai",
        "model_id": load.model,
        "dataset_name": dataset_name,
        "num_prompts": len(calls),
        "request_rate": "inf" if request_rate == float("inf") else request_rate,
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
    }


def _details(answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "input_lens": [answer.prompt_len for answer in answers],
        "output_lens": [answer.output_len for answer in answers],
        "ttfts": [answer.ttft for answer in answers],
        "itls": [answer.itl for answer in answers],
        "start_times": [answer.started for answer in answers],
        "errors": [answer.error for answer in answers],
    }


def _rows(results: dict[str, Any]) -> dict[str, str]:
    known = {name: value for name, value in results.items() if value is not None}
    return {name.replace("_", " "): f"{value:,.2f}" for name, value in known.items()}
