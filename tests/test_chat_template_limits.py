"""What chat templates may not do, whatever they try, and what becomes of the process that renders them."""

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic import chat_template
from moesaic.chat_template import ChatTemplate
from moesaic.errors import UsageError
from moesaic.tokenizer import Tokenizer, byte_tokenizer

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ON_DEMAND = "{% if messages[0].content == 'endless' %}" + ENDLESS + "{% endif %}{{ messages[0].content }}"


def with_templates(templates: object) -> Tokenizer:
    rust = byte_tokenizer()._rust
    return Tokenizer(rust, {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": templates})


ESCAPES = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.os }}",
    "{{ (strftime_now | attr('__globals__')).os }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ ('{0.__class__}' | attr('format'))(1).x.y }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{{ self.__init__.__globals__.x }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].getcwd() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]
BOMBS = [
    "{{ 'x' * 10**10 }}",
    "{{ 'x' | center(10**9) }}",
    "{{ '%0999999999d' | format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{% set ns = namespace(l=[0] * 1000) %}{% for i in range(99999) %}{% set ns.l = ns.l * 2 %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'y' * 10**5 }}{% endfor %}{% endset %}{{ x | length }}",
]
BROKEN = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ raise_exception('only one\nuser,\x1b[31m please' ~ 'a' * 10**6) }}",
    "{{ messages[7].content }}",
    "{% if %}",
    "{{ 1 / 0 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "{% if x %}" * 3000,
    "{% set x = 'a' * 2**22 %}{% for i in range(9) %}{{ x }}{% endfor %}",
    "{{ no_such_function() }}",
    "{{ 1 | no_such_filter }}",
]


@pytest.mark.parametrize("template", ESCAPES + BOMBS + BROKEN, ids=lambda template: template[:60])
def test_hostile_and_broken_templates_end_in_one_line(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 60.0)  # the machine may be busy; memory is what ends these
    with pytest.raises(UsageError, match="chat template") as caught:
        with_templates(template).apply_chat_template(HELLO["messages"])
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    if template in BOMBS:
        assert "512 MiB" in message


def test_an_endless_template_loses_its_process_and_the_next_call_gets_a_new_one() -> None:
    template = ChatTemplate(ON_DEMAND)
    assert template.render(HELLO) == "hello"
    first = template._process
    started = time.monotonic()
    with pytest.raises(UsageError, match="longer than 5 s"):
        template.render({"messages": [{"content": "endless"}]})
    assert 4.9 < time.monotonic() - started < 15
    assert first is not None
    assert first.poll() is not None
    assert template.render(HELLO) == "hello"
    assert template._process is not first


@pytest.mark.parametrize("source", ["{{ 9**(9**9) }}", "{{ ('a' * 10**4 + 'b') is in ('a' * 10**8) }}" + ENDLESS])
def test_endless_compilation_and_endless_steps_are_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1.0)
    with pytest.raises(UsageError, match=r"longer than 1 s|512 MiB"):
        ChatTemplate(source).render({})


def test_an_interrupted_call_leaves_no_answer_behind() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    template = ChatTemplate(ON_DEMAND)
    template.render(HELLO)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            template.render({"messages": [{"content": "endless"}]})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert template.render(HELLO) == "hello"


def test_a_process_that_was_killed_is_replaced() -> None:
    template = ChatTemplate(ON_DEMAND)
    template.render(HELLO)
    assert template._process is not None
    os.kill(template._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, template._process.pid, os.WEXITED | os.WNOWAIT)
    assert template.render(HELLO) == "hello"


def test_the_process_has_no_secrets_and_ends_with_its_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    template = ChatTemplate("{{ strftime_now('%H') }}")
    template.render({})
    process = template._process
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    names = {entry.split(b"=")[0] for entry in environment} - {b"", b"LD_LIBRARY_PATH"}
    assert names == {b"PYTHONPATH", b"TZ"}
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert f"{chat_template.MAX_MEMORY}" in limits
    del template
    gc.collect()
    assert process.poll() is not None


def test_threads_get_their_own_answers() -> None:
    template, wrong = ChatTemplate("{{ messages[0].content }}"), []

    def ask(name: str) -> None:
        for number in range(40):
            text = f"{name} {number} " * random.randrange(1, 3000)
            if template.render({"messages": [{"content": text}]}) != text:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def gone(pid: int, seconds: float) -> bool:
    """Whether the process ends within that time; one that nobody waits for counts as ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.02)
                continue
        return True
    return False


@contextlib.contextmanager
def program(script: str, *arguments: str) -> "Iterator[tuple[subprocess.Popen[str], list[int]]]":
    """A program that has rendered one template `t`, and the process ids that it printed first."""
    start = (
        "import os, signal, sys, threading, time\n"
        "from moesaic import chat_template\n"
        "chat_template.MAX_SECONDS = 1.0 if 'endless' in sys.argv else 60.0\n"
        f"t = chat_template. ChatTemplate({ON_DEMAND!r})\n"
        "t.render({'messages': [{'content': 'x'}]})\n"
    )
    source = str(Path(chat_template.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", start + script, *arguments],
        env=os.environ | {"PYTHONPATH": source},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, [int(word) for word in process.stdout.readline().split()]
        finally:
            process.kill()


def test_the_process_dies_with_a_killed_parent_idle_or_busy() -> None:
    with program("print(t._process.pid, flush=True); time.sleep(99)") as (parent, (pid,)):
        assert not gone(pid, 0.1)
        parent.kill()
        assert gone(pid, 5)
    busy = "print(t._process.pid, flush=True); t.render({'messages': [{'content': 'endless'}]})"
    with program(busy, "endless") as (parent, (pid,)):
        time.sleep(0.3)
        parent.kill()
        assert gone(pid, 40)  # at the limit of its processor time, which on a busy machine takes longer


def test_a_forked_child_does_not_keep_it_alive() -> None:
    script = (
        "child = os.fork()\n"
        "if child == 0: time.sleep(60); os._exit(0)\n"
        "print(t._process.pid, child, flush=True); time.sleep(99)\n"
    )
    with program(script) as (parent, (pid, child)):
        try:
            assert not gone(pid, 0.1)
            parent.kill()
            assert gone(pid, 5)
            assert not gone(child, 0.1)
        finally:
            os.kill(child, signal.SIGKILL)


def test_after_a_fork_both_sides_render_even_when_a_thread_was_in_a_call() -> None:
    script = (
        "render = lambda text: t.render({'messages': [{'content': text}]})\n"
        "answers = []\n"
        "busy = threading.Thread(target=lambda: [answers.append(render(str(i)) == str(i)) for i in range(400)])\n"
        "busy.start()\n"
        "pid = t._process.pid\n"
        "codes = []\n"
        "for _ in range(5):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        signal.alarm(50)\n"
        "        fine = render('child') == 'child' and t._process.pid != pid\n"
        "        sys.exit(0 if fine else 1)\n"  # through the exit handlers, which must not touch the parent's process
        "    codes.append(os.waitpid(child, 0)[1])\n"
        "busy.join()\n"
        "print(*codes, int(all(answers)), int(t._process.pid == pid), flush=True)\n"
    )
    with program(script) as (_, printed):
        assert printed == [0, 0, 0, 0, 0, 1, 1]
