"""The python tool as the model and the API meet it, in whichever sandbox this machine has."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tools.conftest import SMALL, TIERS, prove_or_skip

from ossia.errors import ConfigError, InputError, LimitError, NotFoundError, UnavailableError
from ossia.harmony import ToolNamespace
from ossia.tools.python import PythonSessions, PythonTool, describe, read_code
from ossia.tools.sandbox.execution import Execution, Output
from ossia.tools.sandbox.limits import Limits

NO_OUTPUT = "[WARN] No output available. Use print() to output anything to stdout to receive the output"


class Notebook:
    def __init__(self, tier: str) -> None:
        self.runner = asyncio.Runner()
        self.sessions = PythonSessions(tier, num_warm=0)
        prove_or_skip(self.runner, self.sessions, tier)

    def run(self, code: str, key: str = "nb") -> str:
        return self.output(code, key).text

    def output(self, code: str, key: str = "nb") -> Any:
        return self.runner.run(self.sessions.tool(key).run("", code))

    def session(self, key: str = "nb") -> Any:
        return self.runner.run(self.sessions.session(key))


@pytest.fixture(scope="module", params=TIERS)
def notebook(request: pytest.FixtureRequest) -> Iterator[Notebook]:
    made = Notebook(request.param)
    yield made
    made.runner.run(made.sessions.aclose())
    made.runner.close()


@pytest.mark.parametrize("tier", TIERS)
def test_packages_of_an_environment_below_tmp_can_be_imported_and_their_files_read(
    tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        site = Path(folder) / "lib" / "site-packages"
        site.mkdir(parents=True)
        (site / "below_tmp.py").write_text(
            "import pathlib\ntext = pathlib.Path(__file__).with_suffix('.txt').read_text()\n"
        )
        (site / "below_tmp.txt").write_text("here")
        for path in (Path(folder), site.parent, site):
            path.chmod(0o755)
        monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
        made = Notebook(tier)
        try:
            assert made.run("import below_tmp\nbelow_tmp.text") == "'here'"
            assert made.run("open('/tmp/own', 'w').write('x')\nopen('/tmp/own').read()") == "'x'"
            assert "Error" in made.run(f"open({str(site / 'below_tmp.txt')!r}, 'w')")
        finally:
            made.runner.run(made.sessions.aclose())
            made.runner.close()
        assert (site / "below_tmp.txt").read_text() == "here"


# A cell --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("2 + 3", "5"),
        ("x = 1", NO_OUTPUT),
        ("None", NO_OUTPUT),
        ("", NO_OUTPUT),
        ("# nothing", NO_OUTPUT),
        ("2 + 3;", NO_OUTPUT),
        ("2 + 3  ; # no", NO_OUTPUT),
        ("'a;b'  # ; here", "'a;b'"),
        ("print('a')\nprint('b', end='')\n'c'", "a\nb\n'c'"),
        ("import sys\nprint('out')\nprint('err', file=sys.stderr)\nprint('out2')", "out\nerr\nout2"),
        ("import subprocess\nprint(1)\nsubprocess.run(['echo', '2'])\nNone", "1\n2"),
        ("for i in range(3):\n    i", NO_OUTPUT),
        ("def f():\n    return 'é✓'\nf()", "'é✓'"),
        ("{'a': 1}", "{'a': 1}"),
        ("import asyncio\nawait asyncio.sleep(0)\n7", "7"),
        ("async def f():\n    return 8\nawait f()", "8"),
        ("import asyncio\nasyncio.run(asyncio.sleep(0, 9))", "9"),
        ("[i async for i in (lambda: (j async for j in __import__('_a')))()] if False else 3", "3"),
        ("display(1, 'two')", "1\n'two'"),
        ("%matplotlib inline\n1", "1"),
        ("from IPython.display import display, HTML\ndisplay(HTML('<b>x</b>'))", "<IPython.core.display.HTML object>"),
        ("import IPython\nIPython.get_ipython() is None", "True"),
        ("__name__", "'__main__'"),
        ("import getpass, os\nos.path.expanduser('~') == os.environ['HOME']", "True"),
        ("import os\nos.getcwd() == os.path.realpath('/mnt/data') or 'data' in os.getcwd()", "True"),
    ],
)
def test_a_cell_shows_what_a_notebook_shows(notebook: Notebook, code: str, text: str) -> None:
    assert notebook.run(code) == text


def test_the_state_stays_between_calls(notebook: Notebook) -> None:
    notebook.run("import math\ndef area(r):\n    return math.pi * r * r\nr = 2", "state")
    assert notebook.run("round(area(r), 3)", "state") == "12.566"
    assert notebook.run("_ + 1", "state") == "13.566"
    assert notebook.run("Out[2], len(In)", "state") == "(12.566, 5)"
    assert notebook.run("from __future__ import annotations", "state") == NO_OUTPUT
    assert notebook.run("def g(a: undefined): pass\ng.__annotations__", "state") == "{'a': 'undefined'}"


def test_conversations_share_nothing(notebook: Notebook) -> None:
    notebook.run("secret = 1\nopen('/mnt/data/s', 'w').write('x')", "one")
    assert "NameError" in notebook.run("secret", "two")
    assert "FileNotFoundError" in notebook.run("open('/mnt/data/s')", "two")


def test_a_traceback_has_the_cells_lines_and_none_of_ours(notebook: Notebook) -> None:
    text = notebook.run("def inner(a, b):\n    return a / b\n\ninner(1, 0)", "trace")
    assert text.startswith("-" * 75 + "\nZeroDivisionError" + " " * 25 + "Traceback (most recent call last)\n")
    assert "Cell In[1], line 4\n      2     return a / b\n      3 \n----> 4 inner(1, 0)" in text
    assert "Cell In[1], line 2, in inner(a, b)\n      1 def inner(a, b):\n----> 2     return a / b" in text
    assert text.endswith("\n\nZeroDivisionError: division by zero")
    assert "ossia" not in text and "\x1b" not in text and "exec(" not in text
    later = notebook.run("inner(2, 0)", "trace")
    assert "Cell In[1], line 2, in inner(a, b)" in later and "Cell In[2], line 1" in later


def test_causes_and_library_frames_are_shown(notebook: Notebook) -> None:
    text = notebook.run(
        "import json\ntry:\n    json.loads('{')\nexcept ValueError as e:\n    raise RuntimeError('bad') from e"
    )
    assert "json/decoder.py:" in text
    assert "The above exception was the direct cause of the following exception:" in text
    assert text.index("JSONDecodeError") < text.index("RuntimeError: bad")
    assert "await" not in notebook.run("import asyncio\nawait asyncio.sleep(0)\n1/0").replace(
        "await asyncio.sleep(0)", ""
    )


def test_a_syntax_error_points_at_its_place(notebook: Notebook) -> None:
    text = notebook.run("x = 1\nif x = 2:\n    pass")
    assert "line 2" in text and "    if x = 2:\n       ^" in text and "SyntaxError: " in text


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("!ls -la", "shell commands (lines that begin with '!') are not available; use Python"),
        ("x = 1\n!pip install requests\nx", "packages cannot be installed"),
        ("%pip install requests", "packages cannot be installed"),
        ("%timeit 1 + 1", "IPython magics (lines that begin with '%') are not available"),
        ("%%time\nsum(range(9))", "IPython magics"),
        ("%%bash\nls", "shell commands"),
        ("?print", "use help(name)"),
        ("print?", "use help(name)"),
        ("input('name?')", "input() cannot be used here"),
        ("import sys\nsys.stdin.read() or 'nothing'", "'nothing'"),
    ],
)
def test_what_only_a_shell_can_do_is_refused_in_words(notebook: Notebook, code: str, says: str) -> None:
    assert says in notebook.run(code)


def test_long_containers_are_broken_up(notebook: Notebook) -> None:
    assert notebook.run("list(range(40))").startswith("[0,\n 1,\n 2,")
    assert notebook.run("{'key' + str(i): i for i in range(20)}").startswith("{'key0': 0,\n 'key1': 1,")


def test_output_keeps_its_head_and_its_tail(notebook: Notebook) -> None:
    text = notebook.run("print('start')\nfor i in range(400000):\n    print(i)\nprint('end')")
    assert text.startswith("start\n0\n1\n") and text.endswith("\n399999\nend")
    assert len(text) < 20_200 and "characters left out" in text
    output = notebook.output("print('start')\nprint('x' * 5_000_000)\nprint('end')")
    logs = output.details["outputs"][0]["logs"]
    assert logs.startswith("start\nxx") and logs.endswith("xx\nend\n") and "bytes of output left out" in logs
    assert output.details["dropped_bytes"] > 3_900_000 and len(logs) < 1_100_000


def test_displays_stand_between_the_lines_printed_around_them(notebook: Notebook) -> None:
    code = "for i in range(50):\n    print('a', i)\n    display(i)\n    print('b', i)"
    expected = "\n".join(f"a {i}\n{i}\nb {i}" for i in range(50))
    assert notebook.run(code) == expected


def test_a_picture_is_an_output_of_the_api_and_a_word_for_the_model(notebook: Notebook) -> None:
    png = b"\x89PNG\r\n\x1a\n" + b"x" * 100
    code = f"class P:\n    def _repr_png_(self):\n        return {png!r}\nprint('before')\nP()"
    output = notebook.output(code)
    assert output.text.startswith("before\n<__main__.P object")
    assert output.details["outputs"] == [
        {"type": "logs", "logs": "before\n"},
        {"type": "image", "url": "data:image/png;base64," + base64.b64encode(png).decode()},
    ]


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
def test_figures_are_shown_when_asked_and_at_the_end_of_the_cell(notebook: Notebook) -> None:
    output = notebook.output(
        "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nprint('mid')\nfig, ax = plt.subplots(1, 2)",
        "fig",
    )
    kinds = [one["type"] for one in output.details["outputs"]]
    assert kinds == ["image", "logs", "image"], output
    assert output.text == "<Figure size 640x480 with 1 Axes>\nmid\n<Figure size 640x480 with 2 Axes>"
    assert notebook.output("print('none left')", "fig").details["outputs"] == [{"type": "logs", "logs": "none left\n"}]
    assert [one["type"] for one in notebook.output("fig", "fig").details["outputs"]] == ["image"]


@pytest.mark.skipif(not importlib.util.find_spec("numpy"), reason="numpy is not installed")
def test_numpy_works(notebook: Notebook) -> None:
    assert notebook.run("import numpy as np\n(np.eye(300) @ np.ones((300, 300))).sum()") == "np.float64(90000.0)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "code", "text"),
    [
        ("pandas", "import pandas as pd\npd.DataFrame({'a': [1, 2]})", "   a\n0  1\n1  2"),
        ("pandas", "pd.Series([1, 2]).to_csv('/mnt/data/t.csv')\nlen(pd.read_csv('/mnt/data/t.csv'))", "2"),
        ("sympy", "import sympy as s\nx = s.symbols('x')\ns.integrate(s.sin(x) ** 2, (x, 0, s.pi))", "pi/2"),
        ("scipy", "import scipy.optimize as o\nround(o.brentq(lambda x: x * x - 2, 0, 2), 6)", "1.414214"),
        ("matplotlib", "import matplotlib.pyplot as plt\nplt.plot([1])\nplt.savefig('/mnt/data/p.png')\nplt.close()\n"
                       "open('/mnt/data/p.png', 'rb').read(4)", "b'\\x89PNG'"),
    ],
)  # fmt: skip
def test_the_packages_that_people_use_work(notebook: Notebook, package: str, code: str, text: str) -> None:
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    assert notebook.run(code, "packages") == text


# Time and endings ----------------------------------------------------------------------------------------------------


def test_a_call_that_takes_too_long_says_so_and_keeps_the_state(notebook: Notebook) -> None:
    async def run() -> tuple[Execution, str]:
        session = await notebook.sessions.session("slow")
        await session.execute("x = 41")
        return await session.execute("import time\nprint('partial')\ntime.sleep(60)", 0.3)

    execution, _ = notebook.runner.run(run())
    text = describe(execution, SMALL)
    assert text.startswith("partial\n") and "KeyboardInterrupt" in text
    assert "[ERROR] Timed out waiting for Jupyter kernel output.\nThe execution was interrupted; variables" in text
    assert notebook.run("x + 1", "slow") == "42"


def test_a_restart_is_told(notebook: Notebook) -> None:
    notebook.run("x = 1\nopen('/mnt/data/kept', 'w').write('file')", "died")
    output = notebook.output("import os\nprint('last words')\nos._exit(7)", "died")
    assert output.is_error and output.details["restarted"]
    assert output.text == (
        "last words\n[ERROR] The kernel died (exit status 7).\n"
        "The kernel was restarted: variables and imports are lost, files in /mnt/data are kept."
    )
    assert "NameError" in notebook.run("x", "died")
    assert notebook.run("open('/mnt/data/kept').read()", "died") == "'file'"


def test_cancelling_stops_the_code_at_once_and_keeps_the_state(notebook: Notebook) -> None:
    async def run() -> tuple[float, str]:
        tool = notebook.sessions.tool("cancel")
        await tool.run("", "y = 5")
        task = asyncio.create_task(
            tool.run("", "import time\nopen('/mnt/data/began', 'w').close()\nwhile True: time.sleep(1)")
        )
        session = await notebook.sessions.session("cancel")
        while not [one for one in await session.list_files() if one.path == "began"]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert session.is_idle
        return 0.0, (await tool.run("", "y")).text

    assert notebook.runner.run(run())[1] == "5"


def test_cancelling_code_that_will_not_stop_ends_it(notebook: Notebook) -> None:
    async def run() -> str:
        tool = notebook.sessions.tool("stubborn")
        await tool.run("", "y = 5")
        task = asyncio.create_task(
            tool.run(
                "",
                "import signal\nsignal.signal(2, signal.SIG_IGN)\nopen('/mnt/data/began', 'w').close()\nwhile 1: pass",
            )
        )
        session = await notebook.sessions.session("stubborn")
        while not [one for one in await session.list_files() if one.path == "began"]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return (await tool.run("", "y")).text

    text = notebook.runner.run(run())
    assert text.startswith("[WARN] The kernel was restarted") and "NameError" in text


def test_a_call_cancelled_while_it_waits_for_a_cancelled_one_loses_nothing(notebook: Notebook) -> None:
    slow = (
        "import time\nopen('/mnt/data/began', 'w').close()\nuntil = time.time() + 0.9\n"
        "while time.time() < until:\n  try: time.sleep(0.1)\n  except KeyboardInterrupt: pass"
    )

    async def run() -> str:
        session = await notebook.sessions.session("twice")
        await session.execute("y = 5")
        first = asyncio.create_task(session.execute(slow))
        while not [one for one in await session.list_files() if one.path == "began"]:
            await asyncio.sleep(0.01)
        for task in (first, asyncio.create_task(session.execute("y = 6"))):
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        execution, note = await session.execute("y, __import__('os').listdir('/mnt/data')")
        return note + describe(execution, SMALL)

    assert notebook.runner.run(run()) == "(5, ['began'])"


def test_a_loss_is_told_by_the_next_call_that_comes_to_its_end(notebook: Notebook) -> None:
    stubborn = "import signal\nsignal.signal(2, signal.SIG_IGN)\nopen('/mnt/data/began', 'w').close()\nwhile 1: pass"

    async def run() -> str:
        session = await notebook.sessions.session("late")
        first = asyncio.create_task(session.execute(stubborn))
        while not [one for one in await session.list_files() if one.path == "began"]:
            await asyncio.sleep(0.01)
        second = "import time\nopen('/mnt/data/second', 'w').close()\ntime.sleep(30)"
        first.cancel()
        task = asyncio.create_task(session.execute(second))
        while not [one for one in await session.list_files() if one.path == "second"]:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([first, task])
        execution, note = await session.execute("1")
        return note + describe(execution, SMALL)

    assert notebook.runner.run(run()).startswith("[WARN] The kernel was restarted")


def test_a_call_beside_another_is_refused_and_harms_nothing(notebook: Notebook) -> None:
    async def run() -> str:
        session = await notebook.sessions.session("beside")
        await session.execute("y = 5")
        sandbox = session._sandbox
        first = asyncio.create_task(sandbox.execute("import time\ntime.sleep(0.5)\ny", 30))
        await asyncio.sleep(0.1)
        with pytest.raises(UnavailableError, match="does not take the call: another one runs"):
            await sandbox.execute("y = 6", 30)
        return describe(await first, SMALL)

    assert notebook.runner.run(run()) == "5"


def test_the_event_loop_is_never_held(notebook: Notebook) -> None:
    async def run() -> int:
        task = asyncio.create_task(notebook.sessions.tool("busy").run("", "import time\ntime.sleep(0.5)"))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert notebook.runner.run(run()) >= 10


def test_calls_of_several_conversations_run_side_by_side(notebook: Notebook) -> None:
    async def run() -> list[str]:
        tools = [notebook.sessions.tool(f"side{i}") for i in range(4)]
        return [one.text for one in await asyncio.gather(*(t.run("", f"{i} * 10") for i, t in enumerate(tools)))]

    assert notebook.runner.run(run()) == ["0", "10", "20", "30"]


def test_calls_of_one_conversation_wait_for_each_other(notebook: Notebook) -> None:
    async def run() -> list[str]:
        tool = notebook.sessions.tool("queue")
        await tool.run("", "n = 0")
        return [one.text for one in await asyncio.gather(*(tool.run("", "n += 1\nn") for _ in range(5)))]

    assert notebook.runner.run(run()) == ["1", "2", "3", "4", "5"]


# Files ---------------------------------------------------------------------------------------------------------------


def test_files_go_in_and_out(notebook: Notebook) -> None:
    session = notebook.session("files")
    run = notebook.runner.run
    run(session.write_file("in/table ä.csv", b"a,b\n1,2\n"))
    assert notebook.run("open('/mnt/data/in/table ä.csv').read()", "files") == "'a,b\\n1,2\\n'"
    notebook.run("open('/mnt/data/out.bin', 'wb').write(bytes(range(256)) * 10000)", "files")
    assert run(session.read_file("out.bin")) == bytes(range(256)) * 10000
    assert run(session.read_file("/mnt/data/out.bin"))[:3] == b"\0\1\2"
    found = run(session.list_files())
    assert [(one.path, one.size_bytes) for one in found] == [("in/table ä.csv", 8), ("out.bin", 2_560_000)]
    assert abs(found[1].modified - time.time()) < 3600
    run(session.write_file("out.bin", b"new"))
    assert run(session.read_file("out.bin")) == b"new"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        ".",
        "..",
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a//b",
        "a/./b",
        "x\0y",
        "\ud800",
        "n" * 300,
        "a/" * 3000 + "b",
    ],
    ids=lambda p: repr(p[:20]),
)
def test_paths_that_lead_elsewhere_are_refused(notebook: Notebook, path: str) -> None:
    session = notebook.session("paths")
    with pytest.raises(InputError):
        notebook.runner.run(session.read_file(path))
    with pytest.raises(InputError):
        notebook.runner.run(session.write_file(path, b"x"))


def test_traps_among_the_files_are_neither_listed_nor_fetched(notebook: Notebook) -> None:
    notebook.run(
        "import os\nos.chdir('/mnt/data')\nos.symlink('/etc/hostname', 'link')\nos.symlink('/', 'dir')\n"
        "os.mkfifo('fifo')\n"
        "open('real', 'w').write('x')\nos.link('real', 'twin')\nos.mkdir('sub')\nos.symlink('../real', 'sub/up')\n"
        "os.symlink('/proc/self/environ', 'env')\nopen(b'bad\\xffname', 'w').close()\n"
        "open('new\\nline', 'w').write('y')\n"
        "with open('sparse', 'wb') as f: f.truncate(200 << 20)\nopen('ok', 'w').write('fine')",
        "traps",
    )
    session, run = notebook.session("traps"), notebook.runner.run
    names = [one.path for one in run(session.list_files())]
    assert names == ["ok", "real", "sparse", "twin"]
    for trap in ("link", "dir/etc/hostname", "fifo", "real", "twin", "sub/up", "env", "sub", "dir"):
        with pytest.raises((InputError, NotFoundError)):
            run(session.read_file(trap))
    with pytest.raises(NotFoundError):
        run(session.read_file("missing"))
    with pytest.raises(InputError):
        run(session.write_file("dir/etc/x", b"x"))
    # What had the name is replaced, not followed.
    for trap in ("link", "fifo", "twin"):
        run(session.write_file(trap, b"mine"))
        assert run(session.read_file(trap)) == b"mine"
    assert notebook.run("open('real').read()", "traps") == "'x'"
    assert run(session.read_file("ok")) == b"fine"


def test_files_can_be_asked_for_while_code_runs(notebook: Notebook) -> None:
    async def run() -> bytes:
        tool = notebook.sessions.tool("both")
        task = asyncio.create_task(tool.run("", "import time\nopen('/mnt/data/now', 'w').write('1')\ntime.sleep(0.6)"))
        session = await notebook.sessions.session("both")
        while not await session.list_files():
            await asyncio.sleep(0.01)
        found = await session.read_file("now")
        assert not task.done()
        await task
        return found

    assert notebook.runner.run(run()) in (b"", b"1")


# The tool ------------------------------------------------------------------------------------------------------------


def test_the_tool_is_declared_as_the_model_was_trained() -> None:
    tool = PythonTool(PythonSessions("off"), "k")
    assert tool.namespace == ToolNamespace.python()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("```\nx\n```\n", "x"),
        ('{"code": "print(1)"}', "print(1)"),
        ('{"code": "not python ("}', '{"code": "not python ("}'),
        ('{"a": "b"}', '{"a": "b"}'),
        ('{"code": 5}', '{"code": 5}'),
        ('{"code": ', '{"code": '),
        ("[" * 100_000, "[" * 100_000),
    ],
    ids=lambda one: one[:20],
)
def test_code_is_found_however_the_model_wrapped_it(arguments: str, code: str) -> None:
    assert read_code(arguments) == code


def test_a_function_of_python_is_answered_in_words() -> None:
    output = asyncio.run(PythonSessions("off").tool("k").run("exec", "1"))
    assert output.is_error and "send the code as the message to python itself" in output.text


def test_no_sandbox_means_no_python_and_says_what_to_install() -> None:
    async def run() -> str:
        async with PythonSessions("off") as sessions:
            with pytest.raises(UnavailableError):
                await sessions.check()
            return (await sessions.tool("k").run("", "1")).text

    assert asyncio.run(run()) == "[ERROR] the python tool is switched off (python_sandbox is 'off')"


@pytest.mark.parametrize(
    "choice", ["unsafe", "unsafe_python", "none", "", "docker", "docker:", "jupyter:x", "docker:--privileged", "AUTO"]
)
def test_a_choice_that_is_none_is_refused_and_nothing_is_unsafe_by_name(choice: str) -> None:
    with pytest.raises(ConfigError):
        PythonSessions(choice)


def test_hostile_code_text_never_raises(notebook: Notebook) -> None:
    for code in ("\0", "\ud800", "(" * 5000, "x = '" + "a" * 3_000_000 + "'", "\r\n\r\n", "\t\tx", "\ufeff1", "1\x0c"):
        output = notebook.output(code, "hostile")
        assert isinstance(output.text, str) and output.text
    assert notebook.run("1", "hostile") == "1"


# Sessions ------------------------------------------------------------------------------------------------------------


def _with_sessions(tier_sessions: PythonSessions, tier: str, run: Any) -> None:
    runner = asyncio.Runner()
    prove_or_skip(runner, tier_sessions, tier)
    try:
        runner.run(run(tier_sessions))
    finally:
        runner.run(tier_sessions.aclose())
        runner.close()


@pytest.mark.parametrize("tier", TIERS)
def test_the_oldest_idle_session_makes_room_and_its_model_is_told(tier: str) -> None:
    async def run(sessions: PythonSessions) -> None:
        for key in ("a", "b"):
            await sessions.tool(key).run("", f"x = '{key}'")
        assert (await sessions.tool("c").run("", "1")).text == "1"
        assert sessions.num_sessions == 2 and not sessions.has_session("a") and sessions.has_session("b")
        text = (await sessions.tool("a").run("", "print('again')")).text
        assert text == (
            "[WARN] This session was ended to make room for others. The environment was replaced by a new one: "
            "variables, imports and the files in /mnt/data are lost.\nagain"
        )
        assert (await sessions.tool("a").run("", "print('later')")).text == "later"

    _with_sessions(PythonSessions(tier, limits=SMALL, max_sessions=2, num_warm=0), tier, run)


@pytest.mark.parametrize("tier", TIERS)
def test_when_all_sessions_are_in_use_the_model_is_told_so(tier: str) -> None:
    async def run(sessions: PythonSessions) -> None:
        task = asyncio.create_task(sessions.tool("a").run("", "import time\ntime.sleep(0.5)\n'done'"))
        while not sessions.has_session("a") or (await sessions.session("a")).is_idle:
            await asyncio.sleep(0.01)
        output = await sessions.tool("b").run("", "1")
        assert output.is_error and output.text == "[ERROR] all 1 python sessions are in use; try again later"
        with pytest.raises(LimitError):
            await sessions.session("b")
        assert (await task).text == "'done'"
        assert (await sessions.tool("b").run("", "1")).text == "1"

    _with_sessions(PythonSessions(tier, limits=SMALL, max_sessions=1, num_warm=0), tier, run)


@pytest.mark.parametrize("tier", TIERS)
def test_an_idle_session_ends_and_its_model_is_told(tier: str) -> None:
    async def run(sessions: PythonSessions) -> None:
        await sessions.tool("a").run("", "x = 1")
        pid = (await sessions.session("a"))._sandbox._process.pid  # type: ignore[union-attr]
        while sessions.has_session("a"):
            await asyncio.sleep(0.02)
        text = (await sessions.tool("a").run("", "x")).text
        assert text.startswith("[WARN] This session was not used for 0 seconds.") and "NameError" in text
        assert pid != (await sessions.session("a"))._sandbox._process.pid  # type: ignore[union-attr]

    _with_sessions(PythonSessions(tier, limits=SMALL, idle_s=0.2, num_warm=0), tier, run)


@pytest.mark.parametrize("tier", TIERS)
def test_a_lost_sandbox_is_replaced_and_the_model_told(tier: str) -> None:
    async def run(sessions: PythonSessions) -> None:
        tool = sessions.tool("a")
        await tool.run("", "x = 1")
        sandbox = (await sessions.session("a"))._sandbox
        task = asyncio.create_task(tool.run("", "import time\ntime.sleep(30)"))
        await asyncio.sleep(0.2)
        sandbox._process.kill()  # type: ignore[union-attr]
        output = await task
        assert (
            "[ERROR] The environment failed while the code ran." in output.text and output.details["status"] == "gone"
        )
        assert "files in /mnt/data are lost" in output.text
        assert (await tool.run("", "1 + 1")).text == "2"

    _with_sessions(PythonSessions(tier, limits=SMALL, num_warm=0), tier, run)


class _Starts:
    """Counts the sandboxes that are taken, and keeps them."""

    def __init__(self, sessions: PythonSessions, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[Any] = []
        self._take = sessions.take_sandbox
        monkeypatch.setattr(sessions, "take_sandbox", self._taking)

    async def _taking(self) -> Any:
        self.taken.append(await self._take())
        return self.taken[-1]


@pytest.mark.parametrize("tier", TIERS)
def test_calls_that_meet_a_lost_sandbox_together_share_the_new_one(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(sessions: PythonSessions) -> None:
        starts = _Starts(sessions, monkeypatch)
        session = await sessions.session("a")
        await session.execute("x = 1")
        await starts.taken[0].close()
        puts = [session.write_file(f"{i}.txt", b"x") for i in range(3)]
        execution, note = (await asyncio.gather(*puts, session.execute("1")))[-1]
        assert execution.status == "ok" and note.startswith("[WARN] The environment failed.")
        assert len(starts.taken) == 2
        assert [one.path for one in await session.list_files()] == ["0.txt", "1.txt", "2.txt"]
        await sessions.end_session("a")
        assert not any(one.is_alive for one in starts.taken)

    _with_sessions(PythonSessions(tier, limits=SMALL, num_warm=0), tier, run)


@pytest.mark.parametrize("tier", TIERS)
def test_a_loss_is_told_although_the_one_before_was_told_late(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(sessions: PythonSessions) -> None:
        starts = _Starts(sessions, monkeypatch)
        session = await sessions.session("a")
        call = asyncio.create_task(session.execute("import time\ntime.sleep(30)"))
        while not starts.taken:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        starts.taken[0]._end()
        # Has a new one before the call knows that its own is gone.
        assert await session.list_files() == []
        assert (await call)[0].status == "gone"
        starts.taken[1]._end()
        assert (await session.execute("1"))[1].startswith("[WARN] The environment failed.")

    _with_sessions(PythonSessions(tier, limits=SMALL, num_warm=0), tier, run)


@pytest.mark.parametrize("tier", TIERS)
def test_a_call_that_waits_while_its_session_ends_starts_nothing(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(sessions: PythonSessions) -> None:
        starts = _Starts(sessions, monkeypatch)
        session = await sessions.session("a")
        running = asyncio.create_task(session.execute("import time\ntime.sleep(30)"))
        while not starts.taken:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(session.execute("1"))
        await asyncio.sleep(0.1)
        await sessions.end_session("a")
        assert (await running)[0].status == "gone"
        with pytest.raises(UnavailableError, match="this python session was ended"):
            await waiting
        with pytest.raises(UnavailableError, match="this python session was ended"):
            await session.write_file("late", b"")
        assert len(starts.taken) == 1
        # The key itself is free for a new session.
        assert (await sessions.tool("a").run("", "2")).text == "2"

    _with_sessions(PythonSessions(tier, limits=SMALL, num_warm=0), tier, run)


@pytest.mark.parametrize("tier", TIERS)
def test_a_sandbox_that_starts_while_its_session_ends_is_closed(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(sessions: PythonSessions) -> None:
        starts = _Starts(sessions, monkeypatch)
        session = await sessions.session("a")
        call = asyncio.create_task(session.execute("1"))
        await asyncio.sleep(0)
        assert not starts.taken
        await sessions.end_session("a")
        assert len(starts.taken) == 1 and not starts.taken[0].is_alive
        with pytest.raises(UnavailableError, match="this python session was ended"):
            await call

    _with_sessions(PythonSessions(tier, limits=SMALL, num_warm=0), tier, run)


@pytest.mark.parametrize("tier", TIERS)
def test_a_warm_sandbox_is_used_and_replaced(tier: str) -> None:
    async def run(sessions: PythonSessions) -> None:
        while not sessions._warm:
            await asyncio.sleep(0.01)
        warm = sessions._warm[0]
        await sessions.tool("a").run("", "1")
        assert (await sessions.session("a"))._sandbox is warm
        while not sessions._warm:
            await asyncio.sleep(0.01)
        assert sessions._warm[0] is not warm

    _with_sessions(PythonSessions(tier, limits=SMALL, num_warm=1), tier, run)


def test_after_closing_every_call_is_answered() -> None:
    async def run() -> str:
        sessions = PythonSessions("auto", num_warm=0)
        await sessions.aclose()
        return (await sessions.tool("a").run("", "1")).text

    assert asyncio.run(run()) == "[ERROR] the python tool is shut down"


# Words ---------------------------------------------------------------------------------------------------------------


def test_a_value_after_text_without_a_line_end_starts_a_line() -> None:
    shown = (Output("stream", "abc"), Output("display", forms={"text/plain": b"5"}), Output("stream", "d"))
    assert describe(Execution("ok", shown), Limits()) == "abc\n5\nd"


def test_every_ending_has_its_words() -> None:
    for status in ("interrupted", "timeout", "died", "memory", "processes", "files", "disk", "gone"):
        text = describe(Execution(status, is_restarted=True), Limits())  # type: ignore[arg-type]
        assert text.startswith("[ERROR]") and "lost" in text


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_sandbox_closes_its_pipes_once_whatever_the_event_loop(monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    """A number that is closed twice may by then be a file of another thread's."""
    from ossia.tools.sandbox import process

    closed: list[bool] = []

    class Watched:
        def __init__(self, file: Any) -> None:
            self._file = file
            self.fileno = file.fileno

        def close(self) -> None:
            fd = self._file.fileno()
            closed.append(os.path.exists(f"/proc/self/fd/{fd}"))
            self._file.close()

    spawn = process._spawn

    def watched(*arguments: Any) -> Any:
        launch, started = spawn(*arguments)
        started.stdin, started.stdout = Watched(started.stdin), Watched(started.stdout)
        return launch, started

    async def main() -> None:
        async with PythonSessions(limits=SMALL, num_warm=0) as sessions:
            await sessions.check()
            for ending in ("6 * 7", "import os; os.kill(os.getppid(), 9)"):
                execution, _ = await (await sessions.session("a")).execute(ending)
                assert execution.status in ("ok", "gone", "died", "error")
                await (await sessions.session("a")).write_file("big", b"x" * (1 << 20))
                assert len(await (await sessions.session("a")).read_file("big")) == 1 << 20
                await sessions.end_session("a")

    monkeypatch.setattr(process, "_spawn", watched)
    factory = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        try:
            runner.run(main())
        except UnavailableError as error:
            pytest.skip(f"no sandbox works on this machine: {error.message[:300]}")
    assert len(closed) >= 6 and all(closed)
