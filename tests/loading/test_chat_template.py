"""Templates render as in `transformers`, and hostile ones end without taking anything along."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arctic_jax.errors import ChatTemplateError, InvalidRequestError
from arctic_jax.loading.chat_template import ChatTemplateRenderer
from arctic_jax.loading.tokenizer import Tokenizer, load_tokenizer
from arctic_jax.testing import TINY_CHAT_TEMPLATE, write_tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{ "Environment: ipython\n" }}{% endif %}
{{- "Today Date: " + date_string + "\n\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' ~ message.role) }}
    {%- endif %}
    {%- if message.content is not defined %}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "parameters": ' }}
            {{- call.function.arguments | tojson }}
            {{- "}" }}
        {%- endfor %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- for tool in tools or [] %}
    {{- tool | tojson(indent=4) + "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
QWEN = """{% set ns = namespace(last=-1, count=0) %}
{% for message in messages[::-1] %}
    {% set index = messages|length - 1 - loop.index0 %}
    {% if ns.last < 0 and message.role == "user" and not message.content.startswith('<tool>') %}
        {% set ns.last = index %}
        {% break %}
    {% endif %}
{% endfor %}
{% for message in messages %}
    {% if message.role == "tool" %}{% continue %}{% endif %}
<|im_start|>{{ message.role }}
    {% if message.reasoning_content is string and loop.index0 > ns.last %}
<think>{{ message.reasoning_content.strip('\n') }}</think>
    {% endif %}
{% generation %}{{ message.content if message.content is string else '' }}{% endgeneration %}
<|im_end|>
    {% set ns.count = ns.count + 1 %}
{% endfor %}
{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{% for document in documents or [] %}{{ document.title }}: {{ document.text }}{% endfor %}
{{ ns.count }} {% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{% macro end(text) %}[{{ text }}]{% endmacro %}
{% if add_generation_prompt %}{{ end('<|im_start|>assistant') }}{% endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant!') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "  What is <b>2 & 2</b>? ½ é 中\n"},
    {"role": "assistant", "content": "Four.\n", "reasoning": "\nadd them\n", "tool_calls": None},
    {"role": "user", "content": "And 3?"},
]
CALL = {"function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, True, "é<"]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def renderer() -> Iterator[ChatTemplateRenderer]:
    renderer = ChatTemplateRenderer(time_limit=1.0, size_limit=100_000)
    yield renderer
    renderer.close()


@pytest.mark.parametrize(
    ("template", "messages", "options"),
    [
        (SMOLLM2, CHAT, {}),
        (SMOLLM2, [{"role": "system", "content": "Be brief."}, *CHAT], {}),
        (SMOLLM2, CHAT, {"add_generation_prompt": False}),
        (LLAMA3, CHAT, {}),
        (LLAMA3, [{"role": "system", "content": " Be brief. "}, *CHAT], {"tools": [TOOL]}),
        (LLAMA3, [*CHAT, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}),
        (LLAMA3, CHAT, {"date_string": "1 Jan 2000"}),
        (QWEN, CHAT, {}),
        (QWEN, [*CHAT, {"role": "assistant", "content": "6", "reasoning_content": "3+3"}], {}),
        (QWEN, [*CHAT, {"role": "tool", "content": "7"}], {"enable_thinking": False}),
        (QWEN, CHAT, {"tools": [TOOL], "documents": [{"title": "T", "text": "body"}]}),
        (MISTRAL, CHAT, {}),
    ],
)
def test_same_text_as_transformers(tokenizer, template, messages, options):
    options = {"add_generation_prompt": True} | options
    ours = tokenizer.render_chat_template(messages, chat_template=template, **options)
    theirs = tokenizer.hf.apply_chat_template(
        messages, chat_template=template, tokenize=False, **options
    )
    assert ours == theirs
    assert "user" in ours or "INST" in ours


def test_same_ids_as_transformers(tokenizer):
    ours = tokenizer.apply_chat_template(CHAT)
    assert ours == tokenizer.hf.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(ours, skip_special_tokens=False).endswith("<|eos|><|assistant|>")


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3, TINY_CHAT_TEMPLATE])
@pytest.mark.parametrize("ending", ["Four is ", "Four\n", "4"])
def test_continue_final_message(tokenizer, template, ending):
    messages = [*CHAT[:1], {"role": "assistant", "content": ending}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    ours = tokenizer.render_chat_template(messages, chat_template=template, **options)
    theirs = tokenizer.hf.apply_chat_template(
        messages, chat_template=template, tokenize=False, **options
    )
    assert ours == theirs
    assert ours.endswith(ending.rstrip() if template is LLAMA3 else ending)


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (CHAT, {"add_generation_prompt": True}, "exclude each other"),
        ([{"role": "assistant", "tool_calls": [CALL]}], {}, "needs a last message"),
        ([], {}, "needs a last message"),
    ],
)
def test_continue_final_message_refused(renderer, messages, options, message):
    options = {"add_generation_prompt": False, "continue_final_message": True} | options
    with pytest.raises(ChatTemplateError, match=message):
        renderer.render(SMOLLM2, messages, **options)


def test_the_process_sees_no_secrets(monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    renderer = ChatTemplateRenderer()
    renderer.render("x", CHAT)
    assert renderer._process is not None
    environment = Path(f"/proc/{renderer._process.pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"A_SECRET" not in environment


def test_strftime_now(tokenizer):
    text = tokenizer.render_chat_template(CHAT, chat_template="{{ strftime_now('%Y') }}")
    assert 2024 < int(text) < 2200


def test_what_a_template_raises_is_the_message(tokenizer):
    with pytest.raises(ChatTemplateError, match="roles must alternate") as raised:
        tokenizer.render_chat_template(CHAT[1:], chat_template=MISTRAL)
    assert isinstance(raised.value, InvalidRequestError)
    assert raised.value.parameter == "messages"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ x", "TemplateSyntaxError"),
        ("{% nonsense %}", "TemplateSyntaxError"),
        ("{{ missing.attribute }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "TypeError"),
    ],
)
def test_a_faulty_template(renderer, template, message):
    with pytest.raises(ChatTemplateError, match=message):
        renderer.render(template, CHAT)


LONG_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='aaaaaaaa') %}"
    "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}"
)
HOSTILE = {
    "endless loop": LONG_LOOP,
    "loop in a macro": "{% macro m() %}" + LONG_LOOP + "{% endmacro %}{{ m() }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": "{% macro m(n) %}{% if n %}{{ m(n-1) ~ m(n-1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "range": "{{ range(10**9) | list | length }}",
    "string times": "{{ 'x' * 10**10 }}",
    "constant times": "{% set a = 'x' * 10**10 %}",
    "list times": "{{ ([0] * 10**10) | length }}",
    "doubling": DOUBLING,
    "power": "{% set x = 10**9 %}{{ (7 ** x) % 10 }}",
    "power of powers": "{% set x = 10**6 %}{{ (x ** x) % 7 }}",
    "center": "{{ 'x' | center(10**10) | length }}",
    "ljust": "{{ 'x'.ljust(10**10) | length }}",
    "format width": "{{ '%10000000000d' % 1 }}",
    "str.format width": "{{ '{:>10000000000}'.format(1) }}",
    "replace": "{% set a = 'x' * 10**6 %}{{ a.replace('x', a) | length }}",
    "join": "{% set a = 'x' * 10**5 %}{{ ([a] * 10**6) | join(a) | length }}",
    "indent": "{{ ('\n' * 10**6) | indent(10**6, blank=true) | length }}",
    "batch": "{{ [1] | batch(10**10, 0) | list | length }}",
    "slice": "{{ [1] | slice(10**10) | list | length }}",
    "lipsum": "{{ lipsum(n=10**8) | length }}",
    "big output": "{% for i in range(99999) %}0123456789{% endfor %}",
    "big piece": "{{ 'x' * 10**7 }}",
    "sum": "{{ ([[0]] * 99999) | sum(start=[]) | length }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_ends(renderer, template):
    start = time.monotonic()
    with pytest.raises(ChatTemplateError, match=r"took more|memory|exceeds|Error|Range too big"):
        renderer.render(template, CHAT)
    assert time.monotonic() - start < 20
    assert renderer.render("{{ messages[0].role }}", CHAT) == "user"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ strftime_now.__globals__['sys'] }}",
        "{{ (messages | map(attribute='__class__') | list)[0].x }}",
        "{{ [''] | map('attr', '__class__') | list | first | attr('mro') }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
    ],
)
def test_the_sandbox_holds(renderer, template):
    with pytest.raises(ChatTemplateError, match=r"SecurityError|UndefinedError"):
        renderer.render(template, CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ messages['__class__'] }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '%s' | format(messages.__class__) }}",
        "{{ self.__class__ }}",
    ],
)
def test_internals_read_as_nothing(renderer, template):
    assert renderer.render(template, CHAT) == ""


def test_the_process_is_kept_and_replaced_when_killed(renderer):
    def process() -> int:
        renderer.render("x", CHAT)
        return renderer._process.pid

    first = process()
    assert process() == first
    with pytest.raises(ChatTemplateError, match=r"took more than 1 s"):
        renderer.render(LONG_LOOP, CHAT)
    second = process()
    assert second != first
    os.kill(second, 9)
    with pytest.raises(ChatTemplateError, match="crashed its process"):
        renderer.render("x", CHAT)
    assert process() != second
    with pytest.raises(ProcessLookupError):  # ended and reaped
        os.kill(first, 0)


def test_closing_ends_the_process():
    renderer = ChatTemplateRenderer()
    renderer.render("x", CHAT)
    process = renderer._process
    assert process is not None
    assert process.poll() is None
    del renderer
    assert process.poll() is not None


def test_many_threads(renderer):
    failures: list[Any] = []

    def work(name: str) -> None:
        for i in range(20):
            text = renderer.render("{{ messages[0].content }}", [{"content": f"{name}{i}"}])
            if text != f"{name}{i}":
                failures.append((name, i, text))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_it_is_quick(renderer):
    renderer.render(SMOLLM2, CHAT)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        renderer.render(SMOLLM2, CHAT)
        times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 0.005


@pytest.mark.parametrize(
    "messages",
    ["hello", [1], [{"role": "user", "content": object()}], [{"role": "user", "content": {1, 2}}]],
)
def test_messages_must_be_plain_data(renderer, messages):
    with pytest.raises(ChatTemplateError, match=r"messages? must be"):
        renderer.render("x", messages)


def test_lone_surrogates_are_refused(renderer):
    with pytest.raises(ChatTemplateError, match="surrogate"):
        renderer.render("{{ messages[0].content }}", [{"content": "a\ud800b"}])


def test_variables_cannot_replace_the_messages(renderer):
    with pytest.raises(TypeError):
        renderer.render("x", CHAT, **{"template": "{{ 1 }}"})
    assert renderer.render("{{ bos_token }}", CHAT, bos_token="<s>") == "<s>"


def test_no_template(tmp_path: Path):
    path = write_tokenizer(tmp_path)
    config = path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>"}')
    with pytest.raises(ChatTemplateError, match="no chat template"):
        load_tokenizer(path).apply_chat_template(CHAT)
