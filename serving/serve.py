"""The command `arctic-jax serve`: a model behind the endpoint."""

import functools
import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from arctic_jax.serving.options import command, stderr

if TYPE_CHECKING:
    from arctic_jax.serving.served_model import ServedOptions
    from arctic_jax.serving.server import HttpOptions
    from arctic_jax.serving.tracing import Tracer

PANEL = "Server options"
LIMITS = "Limits"


def _option(*names: str, help: str, panel: str = PANEL, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take a YAML file's values for options that are not on the command line.

    Raises:
        typer.BadParameter: the file is not YAML of that kind, or names no option.
    """
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(str(error)) from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold names of options and their values")
    ctx.default_map = {**_defaults(ctx.command.params, values), **(ctx.default_map or {})}
    return path


def _defaults(parameters: list[Any], values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what a command's parameters are for options that come as names and values.

    Raises:
        typer.BadParameter: there is no such option.
    """
    defaults: dict[str, Any] = {}
    for name, value in values.items():
        parameter, negated = _find(parameters, str(name))
        if isinstance(value, dict):  # such as speculative-config
            value = json.dumps(value)
        if parameter.multiple and not isinstance(value, list):
            value = [value]
        defaults[parameter.name] = not value if negated else value
    return defaults


def _find(parameters: list[Any], name: str) -> tuple[Any, bool]:
    """Return the parameter that an option sets, and whether it is its --no- form."""
    wanted = "--" + name.replace("_", "-")
    for parameter in parameters:
        if parameter.name is not None and wanted in (*parameter.opts, *parameter.secondary_opts):
            return parameter, wanted in parameter.secondary_opts
    raise typer.BadParameter(f"there is no option {wanted}")


@dataclass(frozen=True)
class Settings:
    """What the command's options say.

    Attributes:
        engine: options as for `LLM`.
        served: how the model is served.
        http: who may ask.
        host, port, uds: where to listen.
        headless: not to listen, but to follow node 0.
        metrics_prefix: of metrics' names.
        shutdown_timeout: seconds for calls to finish.
        step_timeout: seconds after which a stuck engine is given up; 0 for never.
        write_timeout: seconds in which a client has to take something of its answer.
        uvicorn: options of the HTTP server.
        otlp_traces_endpoint: where spans go, if anywhere.
    """

    engine: dict[str, Any]
    served: "ServedOptions"
    http: "HttpOptions"
    host: str
    port: int
    uds: str | None
    headless: bool
    metrics_prefix: str
    shutdown_timeout: float
    step_timeout: float
    write_timeout: float
    uvicorn: dict[str, Any]
    otlp_traces_endpoint: str | None = None

    def tracer(self) -> "Tracer | None":
        """Return what sends a span of every call, if the user wants that.

        Raises:
            ValueError: see `Tracer`.
        """
        from arctic_jax.serving.tracing import Tracer

        if self.otlp_traces_endpoint is None:
            return None
        return Tracer(self.otlp_traces_endpoint, self.served.names[0])


def read_settings(
    engine: dict[str, Any],
    model_tag: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The same as --model.")
    ] = None,
    config: Annotated[
        Path | None,
        _option(
            help="YAML: names of options and their values.", callback=read_config, is_eager=True
        ),
    ] = None,
    host: Annotated[str, _option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, _option(min=0, max=65535, help="Port to listen on.")] = 8000,
    uds: Annotated[str | None, _option(help="A unix socket instead.")] = None,
    served_model_name: Annotated[
        list[str] | None, _option(help="Name in the API; repeatable. By default the model.")
    ] = None,
    headless: Annotated[
        bool, _option("--headless", help="No endpoint: follow node 0, see --nnodes.")
    ] = False,
    api_key: Annotated[
        list[str] | None,
        _option(
            help="A key that opens; repeatable. In the environment it is not seen by others.",
            envvar=["ARCTIC_JAX_API_KEY", "VLLM_API_KEY"],
            show_envvar=True,
        ),
    ] = None,
    public_metrics: Annotated[
        bool, _option("--public-metrics", help="/metrics without a key, as /health is.")
    ] = False,
    allow_unauthenticated: Annotated[
        bool,
        _option("--allow-unauthenticated", help="Let others than this machine in without a key."),
    ] = False,
    allowed_origins: Annotated[
        str, _option(help="JSON list: web pages whose scripts may call.")
    ] = "[]",
    ssl_keyfile: Annotated[str | None, _option(help="For TLS.")] = None,
    ssl_certfile: Annotated[str | None, _option(help="For TLS.")] = None,
    ssl_ca_certs: Annotated[str | None, _option(help="Who signs clients' certificates.")] = None,
    ssl_cert_reqs: Annotated[
        int, _option(min=0, max=2, help="2: clients must have a certificate.")
    ] = 0,
    chat_template: Annotated[
        str | None, _option(help="A file, or the template itself, instead of the model's.")
    ] = None,
    trust_request_chat_template: Annotated[
        bool, _option("--trust-request-chat-template", help="Calls may bring their own.")
    ] = False,
    response_role: Annotated[str, _option(help="Of answers.")] = "assistant",
    enable_auto_tool_choice: Annotated[
        bool, _option("--enable-auto-tool-choice", help="The model may call tools.")
    ] = False,
    tool_call_parser: Annotated[
        str | None, _option(help="How it does: hermes, qwen, llama3_json.")
    ] = None,
    reasoning_parser: Annotated[
        str | None, _option(help="How it reasons: qwen3, deepseek_r1.")
    ] = None,
    generation_config: Annotated[
        str, _option(help="Sampling defaults: auto, the model's own; vllm, the same for all.")
    ] = "auto",
    override_generation_config: Annotated[
        str, _option(help="JSON object: sampling defaults that go before those.")
    ] = "{}",
    return_tokens_as_token_ids: Annotated[
        bool, _option("--return-tokens-as-token-ids", help="Log-probabilities name ids.")
    ] = False,
    enable_prompt_tokens_details: Annotated[
        bool, _option("--enable-prompt-tokens-details", help="Usage has cached_tokens.")
    ] = False,
    enable_force_include_usage: Annotated[
        bool, _option("--enable-force-include-usage", help="Every chunk has usage.")
    ] = False,
    metrics_prefix: Annotated[
        str, _option(help="Of metrics' names; vllm: for what was made for vLLM.")
    ] = "arctic_jax:",
    otlp_traces_endpoint: Annotated[
        str | None, _option(help="URL of a collector for OpenTelemetry's spans, one a call.")
    ] = None,
    shutdown_timeout: Annotated[
        float, _option(min=0, help="Seconds for calls to finish after SIGTERM.")
    ] = 30.0,
    step_timeout: Annotated[
        float, _option(min=0, help="Seconds after which a stuck engine is given up; 0: never.")
    ] = 300.0,
    uvicorn_log_level: Annotated[str, _option(help="critical to trace.")] = "info",
    access_log: Annotated[bool, _option("--access-log", help="A line for every call.")] = False,
    max_body_size: Annotated[int, _option(min=1, help="Bytes of a call.", panel=LIMITS)] = 32 << 20,
    max_prompts: Annotated[int, _option(min=1, help="Prompts of a call.", panel=LIMITS)] = 1024,
    max_n: Annotated[int, _option(min=1, help="Answers to a prompt.", panel=LIMITS)] = 128,
    max_stop_strings: Annotated[int, _option(min=0, help="Of a call.", panel=LIMITS)] = 16,
    max_num_queued_reqs: Annotated[
        int, _option(min=0, help="Answers that wait; then 503.", panel=LIMITS)
    ] = 4096,
    max_queued_tokens: Annotated[
        int, _option(min=1, help="Prompt tokens that wait; then 503.", panel=LIMITS)
    ] = 2_000_000,
    max_header_size: Annotated[
        int, _option(min=1024, help="Bytes of a call's headers.", panel=LIMITS)
    ] = 64 << 10,
    keep_alive_timeout: Annotated[
        int, _option(min=1, help="Seconds that a connection may be idle.", panel=LIMITS)
    ] = 5,
    body_timeout: Annotated[
        float, _option(min=1, help="Seconds between pieces of a body.", panel=LIMITS)
    ] = 30.0,
    write_timeout: Annotated[
        float,
        _option(min=1, help="Seconds without a client's taking what is sent.", panel=LIMITS),
    ] = 60.0,
) -> Settings:
    """Check the options of `arctic-jax serve`, and return what they say.

    Raises:
        ValueError: one is wrong, or lets anybody in.
    """
    from arctic_jax.serving import lifecycle, reasoning_parsers, tool_parsers
    from arctic_jax.serving.limits import Limits
    from arctic_jax.serving.served_model import ServedOptions
    from arctic_jax.serving.server import HttpOptions

    if model_tag is not None:
        engine["model"] = model_tag
    keys = [key for key in api_key or () if key]
    if not (keys or allow_unauthenticated or lifecycle.is_local(host, uds)):
        raise ValueError(
            f"--host {host} lets others than this machine in: give --api-key, or say "
            "--allow-unauthenticated"
        )
    if headless != (engine["node_rank"] > 0):
        raise ValueError(
            f"--node-rank {engine['node_rank']} must {'not ' if headless else ''}be --headless: "
            "node 0 has the endpoint, the others follow it"
        )
    if enable_auto_tool_choice and tool_call_parser is None:
        raise ValueError("--enable-auto-tool-choice needs --tool-call-parser")
    served = ServedOptions(
        names=tuple(served_model_name or (engine["model"],)),
        limits=Limits(
            max_body_bytes=max_body_size,
            max_prompts=max_prompts,
            max_n=max_n,
            max_stop_strings=max_stop_strings,
            max_num_queued_reqs=max_num_queued_reqs,
            max_queued_tokens=max_queued_tokens,
        ),
        tool_parser=_chosen("tool-call-parser", tool_call_parser, tool_parsers.PARSERS),
        enable_auto_tool_choice=enable_auto_tool_choice,
        reasoning_parser=_chosen("reasoning-parser", reasoning_parser, reasoning_parsers.PARSERS),
        chat_template=_template(chat_template),
        trust_request_chat_template=trust_request_chat_template,
        response_role=response_role,
        use_generation_config=_chosen(
            "generation-config", generation_config, {"auto": True, "vllm": False}
        ),
        override_generation_config=_json(
            "override-generation-config", override_generation_config, dict
        ),
        return_tokens_as_token_ids=return_tokens_as_token_ids,
        enable_prompt_tokens_details=enable_prompt_tokens_details,
        enable_force_include_usage=enable_force_include_usage,
    )
    return Settings(
        engine=engine,
        served=served,
        http=HttpOptions(
            api_keys=keys,
            public_metrics=public_metrics,
            max_header_bytes=max_header_size,
            body_timeout=body_timeout,
            allowed_origins=_json("allowed-origins", allowed_origins, list),
        ),
        host=host,
        port=port,
        uds=uds,
        headless=headless,
        metrics_prefix=metrics_prefix,
        shutdown_timeout=shutdown_timeout,
        step_timeout=step_timeout,
        write_timeout=write_timeout,
        uvicorn={
            "timeout_keep_alive": keep_alive_timeout,
            "h11_max_incomplete_event_size": max_header_size,
            "log_level": uvicorn_log_level,
            "access_log": access_log,
            "ssl_keyfile": ssl_keyfile,
            "ssl_certfile": ssl_certfile,
            "ssl_ca_certs": ssl_ca_certs,
            "ssl_cert_reqs": ssl_cert_reqs,
        },
        otlp_traces_endpoint=otlp_traces_endpoint,
    )


@functools.wraps(read_settings, assigned=())  # it has the same options
def serve(**options: Any) -> None:
    """Serve a model over HTTP, as OpenAI and vLLM do; see docs/serving.md."""
    from arctic_jax.serving import lifecycle
    from arctic_jax.serving.served_model import ServedModel
    from arctic_jax.serving.server import build_app

    settings = read_settings(**options)
    if settings.headless:
        stderr.print(Text("Waiting for node 0; it ends this node, too", "dim"))
        lifecycle.follow(settings.engine)
        return
    tracer = settings.tracer()
    with lifecycle.bind(settings.host, settings.port, settings.uds) as listener:
        running = lifecycle.load(settings.engine)
        model = ServedModel(running, settings.served)
        metrics = lifecycle.measure(model, settings.metrics_prefix)
        address = settings.uds or "{}:{}".format(*listener.getsockname()[:2])
        # What stays for good is not looked at again: a full collection would hold up all answers.
        gc.collect()
        gc.freeze()
        stderr.print(Text(f"{model.name} is ready on {address}; Ctrl-C stops the server", "dim"))
        lifecycle.run(
            build_app(model, metrics, replace(settings.http, tracer=tracer)),
            listener,
            model,
            running,
            metrics,
            shutdown_timeout=settings.shutdown_timeout,
            step_timeout=settings.step_timeout,
            write_timeout=settings.write_timeout,
            **settings.uvicorn,
        )
    if tracer is not None:
        tracer.close()


def settings_of(options: Mapping[str, Any]) -> Settings:
    """Return what the command would make of options that come as names and values.

    Raises:
        ValueError: there is no such option, or its value is wrong.
    """
    app = typer.Typer(add_completion=False)
    command(app, "serve")(read_settings)
    parser = typer.main.get_command(app)
    try:
        given = _defaults(parser.params, options)
        return parser.main(["--debug"], "serve", standalone_mode=False, default_map=given)
    except typer.BadParameter as error:
        raise ValueError(error.format_message()) from error


def _chosen(option: str, name: str | None, choices: dict[str, Any]) -> Any:
    if name is None:
        return None
    if name not in choices:
        raise ValueError(f"--{option} must be one of {', '.join(choices)}, got {name!r}")
    return choices[name]


def _json(option: str, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--{option} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"--{option} must be a JSON {kind.__name__}, got {text!r:.200}")
    return value


def _template(given: str | None) -> str | None:
    """Read a template that is given as a file; one in braces is the template itself."""
    if given is None or "{" in given:
        return given
    return Path(given).read_text("utf-8")
