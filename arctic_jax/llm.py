"""`LLM`: a model in this process, for scripts and notebooks. Names and defaults are vLLM's.

One that generates has an `engine`, one that embeds an `embedder`.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from arctic_jax.config import DEFAULT_MODEL, EngineConfig
from arctic_jax.embedding.embedder import Embedder, EmbeddingParams
from arctic_jax.embedding.text_encoder import Text
from arctic_jax.engine.replicas import Engine, make_engine
from arctic_jax.errors import InvalidRequestError
from arctic_jax.interrupts import interrupts_held
from arctic_jax.loading.model_files import open_model
from arctic_jax.models.registry import is_encoder
from arctic_jax.progress import Report, bars
from arctic_jax.request import RequestOutput, RequestOutputKind, SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}`; each may have `cache_salt`."""
Message = Mapping[str, Any]
FINAL_ONLY = RequestOutputKind.FINAL_ONLY


class LLM:
    """A language model that generates text from prompts, or one that embeds texts.

    Args:
        model: a directory, a GGUF file, a hub id, or an alias (`arctic-jax models list`).
        progress: show bars for downloading, loading and compiling.
        options: fields of `LoadConfig`, `ParallelConfig`, `CacheConfig` and `SchedulerConfig`, and
            `speculative_config`, see `SpeculativeConfig`.

    Raises:
        ModelNotFoundError, UnsupportedModelError, CheckpointError: see `arctic_jax.errors`.
        TypeError, ValueError: an option is unknown or out of range.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, *, progress: bool = True, **options: Any
    ) -> None:
        config = EngineConfig.from_keywords(model=str(model), **options)
        self._progress = progress
        self._config = config
        self._engine: Engine | None = None
        self._embedder: Embedder | None = None
        with bars(progress) as report:
            files = open_model(config.load, report)
            if is_encoder(files.config, files.directory):
                self._embedder = Embedder(config, report, files)
            else:
                self._engine = make_engine(config, report, files)
        self._ids = itertools.count()
        # The newest state of each request that its caller has not looked at yet: a stream may be
        # read while another one, or a call of `generate`, runs the steps.
        self._unread: dict[str, RequestOutput] = {}

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate an answer to each prompt, in their order.

        Args:
            prompts: one or many.
            sampling_params: for all, or one for each; `None` for the model's defaults.
            use_tqdm: show a progress bar.
            priority: of each prompt, lower first, with `scheduling_policy="priority"`.

        Raises:
            InvalidRequestError: a prompt or a parameter is out of range; nothing is generated.
        """
        many = _as_list(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = (
            [sampling_params] * len(many)
            if isinstance(sampling_params, SamplingParams)
            else list(sampling_params)
        )
        if len(params) != len(many):
            raise ValueError(f"{len(params)} sampling_params for {len(many)} prompts")
        priorities = [0] * len(many) if priority is None else list(priority)
        if len(priorities) != len(many):
            raise ValueError(f"{len(priorities)} priorities for {len(many)} prompts")
        ids: list[str] = []
        try:
            for prompt, one, rank in zip(many, params, priorities, strict=True):
                ids.append(str(next(self._ids)))
                self._add(ids[-1], prompt, replace(one, output_kind=FINAL_ONLY), rank)
            with bars(use_tqdm and self._progress) as report:
                return self._run(ids, report)
        finally:  # Ctrl-C, or a bad prompt among good ones: nothing is left behind
            self._forget(ids)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, through a chat template: the model's own."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            self.engine.tokenizer.apply_chat_template(
                conversation,  # pyright: ignore[reportArgumentType]
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput]:
        """Answer one prompt, or one conversation; yield the answer's state after each step.

        Closing the generator early aborts the request.
        """
        params = sampling_params or self.get_default_sampling_params()
        if not isinstance(prompt, str | Mapping) and prompt and isinstance(prompt[0], Mapping):
            prompt = self.engine.tokenizer.apply_chat_template(prompt)  # pyright: ignore
        request_id = str(next(self._ids))
        try:
            self._add(request_id, prompt, params, 0)  # pyright: ignore[reportArgumentType]
            finished = False
            while not finished:
                if request_id not in self._unread:
                    self._step()
                output = self._unread.pop(request_id, None)
                if output is not None:
                    finished = output.finished
                    yield output
        finally:
            self._forget([request_id])

    @property
    def engine(self) -> Engine:
        """What generates.

        Raises:
            ValueError: the model embeds.
        """
        if self._engine is None:
            raise ValueError(f"{self._config.load.model} is an embedding model: use LLM.embed")
        return self._engine

    @property
    def embedder(self) -> Embedder:
        """What embeds.

        Raises:
            ValueError: the model generates.
        """
        if self._embedder is None:
            raise ValueError(f"{self._config.load.model} is not an embedding model")
        return self._embedder

    def embed(
        self,
        texts: Text | Sequence[Text],
        *,
        use_tqdm: bool = True,
        on_error: Literal["raise", "nan"] = "raise",
        **params: Any,
    ) -> np.ndarray:
        """Return a vector for each text, in their order: float32 `[texts, dimensions]`.

        Args:
            texts: one or many, as text or token ids.
            use_tqdm: show a progress bar.
            on_error: see `Embedder.embed`.
            params: fields of `EmbeddingParams`: `prompt_name`, `prompt`, `truncate`, `dimensions`.

        Raises:
            ValueError: the model generates.
            InvalidRequestError: a text cannot be embedded, or a parameter is out of range.
        """
        embedder = self.embedder
        with bars(use_tqdm and self._progress) as report:
            return embedder.embed(
                _as_list(texts),  # pyright: ignore[reportArgumentType]
                EmbeddingParams(**params),
                on_error=on_error,
                report=report,
            )

    encode = embed

    def get_tokenizer(self) -> Any:
        """Return the model's `transformers` tokenizer."""
        return (self._embedder or self.engine).tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the defaults of the model's `generation_config.json`."""
        return self.engine.default_sampling_params()

    def reset_prefix_cache(self) -> None:
        """Forget the cached prefixes."""
        self.engine.reset_prefix_cache()

    def _add(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int) -> None:
        text, token_ids, salt = parse_prompt(prompt, self.engine)
        with interrupts_held():
            self.engine.add_request(request_id, token_ids, params, text, priority, salt)

    def _run(self, ids: Sequence[str], report: Report) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        wanted = set(ids)
        while len(done) < len(ids):
            self._step()
            for request_id in wanted & self._unread.keys():
                done[request_id] = self._unread.pop(request_id)
                report("Generating", len(done), len(ids))
        return [done[request_id] for request_id in ids]

    def _step(self) -> None:
        with interrupts_held():
            for output in self.engine.step():
                self._unread[output.request_id] = output

    def _forget(self, ids: Sequence[str]) -> None:
        """Abort what is not finished."""
        with interrupts_held():
            for request_id in ids:
                self.engine.abort(request_id)
                self._unread.pop(request_id, None)


def parse_prompt(prompt: Prompt, engine: Engine) -> tuple[str | None, Sequence[int], str | None]:
    """Return a prompt's text (if it has one), its token ids and its cache salt.

    Raises:
        InvalidRequestError: it is none of the forms of `Prompt`.
    """
    text, ids, salt = None, prompt, None
    if isinstance(prompt, Mapping):
        text, salt = prompt.get("prompt"), prompt.get("cache_salt")
        ids = text if prompt.get("prompt_token_ids") is None else prompt["prompt_token_ids"]
    if isinstance(ids, str):
        return ids, engine.tokenizer.encode(ids), salt
    if isinstance(ids, Sequence | np.ndarray) and _all_integers(ids):
        return text, ids, salt  # pyright: ignore[reportReturnType]
    raise InvalidRequestError(
        f"a prompt is text, token ids or a mapping of these, got {prompt!r:.100}", "prompt"
    )


def _as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """Tell one prompt from many: a list of integers is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]  # pyright: ignore[reportReturnType]
    many: list[Any] = list(prompts)
    if many and _all_integers(many):
        return [many]
    return many


def _all_integers(values: Iterable[Any]) -> bool:
    """Ask each type once: asking a thousand tokens costs as much as the rest of a request."""
    return all(issubclass(kind, numbers.Integral) for kind in set(map(type, values)))
