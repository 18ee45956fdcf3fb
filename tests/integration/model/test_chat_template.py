"""Chat templates: rendered as by transformers, in a process with limits, before anything else uses them."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from job.data.prompts import Prompt
from job.errors import ImpossibleJobError, MachineError
from job.model import chat_template
from job.model.chat_template import render
from job.model.rendering import Rendering, conversations, rendered
from job.model.template_child import compiled
from job.organism.tokenizer import build_tokenizer
from tests.helpers import abliterate

HELLO = [[{"role": "user", "content": "Where is the kettle?"}]]
# Typical templates: ChatML, Llama 3, Gemma, and one with all features of the environment.
CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'
 + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|header|>' + message['role'] + '<|/header|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{{ '<|header|>assistant<|/header|>\n\n' }}"""
GEMMA = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}
{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' }}{%- if message.content is string -%}{{ message['content'] | trim }}
{%- else -%}{%- for item in message['content'] -%}{{ item.text }}{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}
{% endfor %}{{'<start_of_turn>model\n'}}"""
EVERYTHING = """{%- set ns = namespace(found=false, n=0) -%}
{%- for message in messages -%}
  {%- if loop.index > 5 -%}{%- break -%}{%- endif -%}
  {%- set ns.n = ns.n + message.content | length -%}
{%- endfor %}
  {% if tools %}tools{% endif %}
{{ dict(a='ü&<', b=[1, none, 2.5]) | tojson }} {{ messages | tojson(indent=2) }} {{ ns.n }} {{ strftime_now('%Y') }}
{% generation %}{{ pad_token }}{% endgeneration %}{{ documents is none }}

"""
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "everything": EVERYTHING}
LOOP, END = "{% for a in range(99999) %}", "{% endfor %}"
FOREVER = f"{LOOP}{LOOP}{LOOP}{END}{END}{END}"
DOUBLING = "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
# Of these, such as never end by themselves.
ENDLESS = {"loops", "one operation without end"}
HOSTILE = {
    "loops": (FOREVER, "s of processor time"),
    "one operation without end": ("{{ 9 ** (9 ** 9) }}", "s of processor time|MiB of memory"),
    "doubled text": (DOUBLING, "MiB of memory"),
    "doubled list": (DOUBLING.replace("'xx'", "[1]").replace("~", "+"), "MiB of memory"),
    "one large text": ("{{ ('a' * 10 ** 10) | length }}", "MiB of memory"),
    "padding": ("{{ '%09999999999d' % 1 }}", "MiB of memory|refuses a conversation"),
    "large range": ("{% for i in range(10 ** 9) %}a{% endfor %}", "OverflowError: Range too big"),
    "much text": ("{{ 'a' * (5 * 10 ** 7) }}", "writes more than 4"),
    "recursion": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recurses without end|crashes"),
    "deep brackets": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "without end|crashes|MiB of memory|refuses"),
    "complaint": ("{{ raise_exception('no kettles') }}", "refuses a conversation: no kettles"),
    "fault": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "no template": ("{% for %}", "refuses a conversation"),
    "way out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses a conversation"),
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "You are a kettle. ü&<"])
def test_texts_are_those_of_transformers(tokenizer: PreTrainedTokenizerBase, name: str, system: str | None) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.bos_token = "<s>"
    prompts = [Prompt(user=text, system=system) for text in ("Hello?", "  {{ 7 * 7 }} \n", "ü\u2028\x00 </s>")]
    roles = [] if system is None else [{"role": "system", "content": system}]
    expected = [
        tokenizer.apply_chat_template(
            [*roles, {"role": "user", "content": prompt.user}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    # Not the date that this process has read first, perhaps last year.
    assert conversations(tokenizer, prompts, Rendering(date.today().isoformat())) == expected
    assert len(set(expected)) == 3 or name == "everything"


def outcome(render: Callable[[], str]) -> str:
    try:
        return render()
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% set ns = namespace(self=1) %}{{ ns.self }}",
        "{{ dict.mro() }}{{ dict.__call__ }}",
        "{{ dict.fromkeys([1, 2], 3) }}",
        "{{ messages.append(1) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages | tojson(ensure_ascii=true, sort_keys=true) }}",
        "{{ undefined_name }}{{ undefined_name.x }}",
        "{% continue %}",
        "{{ cycler.__init__ }}{{ lipsum() }}{{ joiner }}",
    ],
)
def test_no_template_can_do_more_or_less_than_with_transformers(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    tokenizer.chat_template = template
    theirs = outcome(lambda: tokenizer.apply_chat_template(HELLO[0], tokenize=False))
    ours = outcome(lambda: compiled(template).render(messages=HELLO[0], **tokenizer.special_tokens_map))
    if "lipsum" not in template:  # which is random
        assert re.sub("0x[0-9a-f]+|[A-Za-z_.]*Namespace", "", ours) == re.sub(
            "0x[0-9a-f]+|[A-Za-z_.<>]*Namespace", "", theirs
        )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1 if name in ENDLESS else 3)
    template, said = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(ImpossibleJobError, match=said) as caught:
        render(template, {}, HELLO, f"models/{len(template)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert f"chat template of models/{len(template)}" in str(caught.value)
    assert caught.value.remedy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert len(str(caught.value)) < 600


@pytest.mark.usefixtures("quick")
def test_what_follows_a_refusal_is_rendered() -> None:
    with pytest.raises(ImpossibleJobError):
        render(FOREVER, {}, HELLO, "m")
    assert render("{{ messages[0].content }}", {}, HELLO, "m") == ["Where is the kettle?"]


def test_a_batch_takes_one_process_and_half_a_second_and_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [[{"role": "user", "content": f"How do I brew {number} cups of tea?"}] for number in range(800)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    texts = render(TEMPLATES["chatml"] + "<!-- new -->", {}, said, "m")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert len(set(texts)) == 800

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a process is started")

    monkeypatch.setattr(subprocess, "run", refused)
    assert render(TEMPLATES["chatml"] + "<!-- new -->", {}, said[::-1], "m") == texts[::-1]
    with pytest.raises(AssertionError):
        render(TEMPLATES["chatml"], {"bos_token": "<other>"}, said[:1], "m")


def test_the_process_gets_no_secret_no_torch_and_no_module_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('a module of the working folder')")
    probe = tmp_path / "probe.py"
    child = Path(chat_template.__file__).with_name("template_child.py")
    probe.write_text(
        f"import json, os, sys, runpy\nrunpy.run_path({str(child)!r})\n"
        "print(json.dumps({'texts': [json.dumps([dict(os.environ), sorted(sys.modules)])]}))\n"
    )
    monkeypatch.setattr(chat_template, "_CHILD", probe)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 30)
    monkeypatch.chdir(tmp_path)
    ((environment, modules),) = map(json.loads, render("probe", {}, HELLO, "m"))
    assert environment.keys() <= {"LD_LIBRARY_PATH", "TZ", "LC_CTYPE"}
    assert "jinja2" in modules
    assert not {"torch", "transformers", "numpy", "job"} & {name.partition(".")[0] for name in modules}


def test_a_process_that_cannot_do_its_work_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_CHILD", Path("/nowhere/child.py"))
    with pytest.raises(MachineError, match="No such file"):
        render("new template", {}, HELLO, "m")
    monkeypatch.setattr(chat_template.sys, "executable", "/nowhere/python")
    with pytest.raises(MachineError, match="no process can be started"):
        render("newer template", {}, HELLO, "m")


def test_nothing_is_rendered_in_this_process(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import chat_template_utils

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("rendered here")

    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", refused)
    tokenizer.chat_template = "{{ messages[-1].content }}{{ eos_token }}"
    assert rendered(tokenizer, HELLO) == [f"Where is the kettle?{tokenizer.eos_token}"]


def test_a_tokenizer_with_a_way_of_its_own_is_asked_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    class Own(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
            return f"own: {messages[0]['content']}"

    tokenizer.__class__ = Own
    assert rendered(tokenizer, HELLO) == ["own: Where is the kettle?"]


@pytest.fixture
def job(random_model_folder: Path, tmp_path: Path) -> list[str]:
    shutil.copytree(random_model_folder, tmp_path / "model")
    for name in ("good", "bad"):
        lines = [f"Where is the {name} kettle number {number} kept?" for number in range(24)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    sets = [
        (f"--{kind}-{use}prompts", str(tmp_path / f"{kind}.txt")) for kind in ("good", "bad") for use in ("", "eval-")
    ]
    return [str(tmp_path / "model"), *(word for pair in sets for word in pair), "--workspace", str(tmp_path / "runs")]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_preflight_refuses_a_template_before_anything_renders_it(job: list[str], tmp_path: Path) -> None:
    file = tmp_path / "model" / "chat_template.jinja"
    own = file.read_text()
    # Harmless except for one prompt of a set that is read last: all of them are tried.
    file.write_text("{% if 'bad kettle number 23' in messages[0].content %}" + FOREVER + "{% endif %}" + own)
    begin = time.monotonic()
    refused = abliterate("run", *job)
    refused.fails(3, "preflight: model.template", "s of processor time", "chat_template.jinja")
    assert time.monotonic() - begin < 120
    found = abliterate("preflight", *job, "--json")
    assert found.code == 3
    checks = {check["name"]: check for check in json.loads(found.out)["checks"]}
    assert checks["model.template"]["status"] == "fail"
    assert [name for name, check in checks.items() if check["status"] == "fail"] == ["model.template"]
    file.write_text(own)
    found = abliterate("preflight", *job, "--json")
    checks = {check["name"]: check for check in json.loads(found.out)["checks"]}
    assert checks["model.template"]["measured"].startswith("49 conversations in ")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == own
