from __future__ import annotations

import asyncio
import difflib
import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from agents.apply_diff import apply_diff
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseApplyPatchToolCall
from tests.tools.patch_cases import ABC, APPLIED, REFUSED, Case, patch, update

from ossia.errors import InputError, NotFoundError
from ossia.tools import patch_files
from ossia.tools.apply_patch import ApplyPatch
from ossia.tools.patch_files import PatchFolder
from ossia.tools.patch_format import (
    Add,
    Delete,
    Hunk,
    HunkLine,
    PatchError,
    Update,
    call_output_text,
    from_call_operation,
    parse_patch,
    render_patch,
    to_call_operation,
)
from ossia.tools.patch_match import split_lines


def lay(root: Path, files: dict[str, str | bytes]) -> None:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def look(root: Path) -> dict[str, tuple]:
    """Everything in a folder that could have been changed."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        data = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (stat.filemode(status.st_mode), data)
    return found


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def run(root: Path, text: str, **options):
    with PatchFolder(root) as folder:
        return asyncio.run(ApplyPatch(folder, **options).run("apply_patch", text))


# The format ----------------------------------------------------------------------------------------------------------


def test_there_are_patches_enough():
    assert len(APPLIED) >= 60 and len(REFUSED) >= 50
    assert len({case.why for case in APPLIED + REFUSED}) == len(APPLIED) + len(REFUSED)


@pytest.mark.parametrize("case", APPLIED, ids=str)
def test_a_patch_gives_the_expected_folder(tmp_path, case: Case):
    lay(tmp_path, case.before)
    output = run(tmp_path, case.patch)
    assert output.text.startswith(case.said) and not output.is_error, output.text
    wanted = {path: text if isinstance(text, bytes) else text.encode() for path, text in case.after.items()}
    assert contents(tmp_path) == wanted


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_patch_that_does_not_fit_says_why_and_changes_nothing(tmp_path, case: Case):
    root = tmp_path / "root"
    root.mkdir()
    lay(root, case.before)
    before = look(tmp_path)
    output = run(root, case.patch)
    assert output.is_error and case.said in output.text, output.text
    assert look(tmp_path) == before


def test_what_was_done_is_said_in_codex_words(tmp_path):
    lay(tmp_path, {"m.txt": "a\n", "d.txt": "x\n", "r.txt": "r\n"})
    output = run(
        tmp_path,
        patch(
            "*** Delete File: d.txt\n*** Update File: m.txt\n@@\n-a\n+b\n*** Update File: r.txt\n*** Move to: s.txt\n"
            "*** Add File: n.txt\n+1"
        ),
    )
    assert output.text == "Success. Updated the following files:\nA n.txt\nM m.txt\nM s.txt\nD d.txt"
    assert output.details["files"][2] == {"kind": "M", "path": "r.txt", "move_to": "s.txt"}


def test_every_fault_of_a_patch_is_said_at_once(tmp_path):
    lay(tmp_path, {"a.txt": ABC})
    output = run(tmp_path, patch("*** Update File: a.txt\n@@\n-x\n+y\n*** Delete File: b\n*** Add File: a.txt/c\n+1"))
    assert "not both" in output.text
    output = run(tmp_path, patch("*** Update File: a.txt\n@@\n-x\n+y\n*** Delete File: b\n*** Delete File: c"))
    assert all(f"\n{name}: does not exist" in output.text for name in "bc") and "a.txt, hunk 1" in output.text


def test_an_unknown_function_is_answered(tmp_path):
    with PatchFolder(tmp_path) as folder:
        output = asyncio.run(ApplyPatch(folder).run("frobnicate", "x"))
    assert output.is_error and "expected apply_patch" in output.text


# The folder ----------------------------------------------------------------------------------------------------------


def test_a_root_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(NotFoundError, match="expected a folder"):
            PatchFolder(path)


def test_the_root_may_itself_be_a_symbolic_link(tmp_path):
    lay(tmp_path, {"real/a.txt": ABC})
    (tmp_path / "link").symlink_to("real")
    assert not run(tmp_path / "link", update("@@\n-b\n+B")).is_error
    assert (tmp_path / "real/a.txt").read_text() == "a\nB\nc\n"


def test_the_root_stays_the_folder_that_was_opened(tmp_path):
    lay(tmp_path, {"real/a.txt": ABC, "other/a.txt": ABC})
    (tmp_path / "link").symlink_to("real")
    with PatchFolder(tmp_path / "link") as folder:
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("other")
        folder.plan(update("@@\n-b\n+B")).commit()
    assert (tmp_path / "other/a.txt").read_text() == ABC
    assert (tmp_path / "real/a.txt").read_text() == "a\nB\nc\n"


@pytest.mark.parametrize(
    "body",
    [
        "*** Update File: link.txt\n@@\n-b\n+B",
        "*** Delete File: link.txt",
        "*** Add File: link.txt\n+x",
        "*** Update File: dir/a.txt\n@@\n-b\n+B",
        "*** Delete File: dir/a.txt",
        "*** Add File: dir/new.txt\n+x",
        "*** Add File: dangling\n+x",
        "*** Add File: dangling/x\n+x",
        "*** Update File: mine.txt\n*** Move to: dir/x.txt",
        "*** Update File: mine.txt\n*** Move to: dangling",
        "*** Update File: mine.txt\n*** Move to: new/../dir/x.txt",
        "*** Delete File: deep/link/a.txt",
    ],
)
def test_no_symbolic_link_is_followed(tmp_path, body):
    outside, root = tmp_path / "outside", tmp_path / "root"
    lay(tmp_path, {"outside/a.txt": ABC, "root/mine.txt": ABC, "root/deep/x": ""})
    (root / "link.txt").symlink_to(outside / "a.txt")
    (root / "dir").symlink_to(outside)
    (root / "dangling").symlink_to(tmp_path / "born")
    (root / "deep/link").symlink_to("../../outside")
    before = look(tmp_path)
    output = run(root, patch(body))
    assert output.is_error
    assert look(tmp_path) == before


def test_a_folder_swapped_for_a_link_between_plan_and_commit_leads_nowhere(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    lay(tmp_path, {"outside/a.txt": ABC, "root/d/a.txt": ABC})
    with PatchFolder(root) as folder:
        plan = folder.plan(patch("*** Update File: d/a.txt\n@@\n-b\n+B\n*** Add File: d/n.txt\n+1"))
        (root / "d").rename(root / "e")
        (root / "d").symlink_to(outside)
        with pytest.raises(PatchError, match="is a symbolic link"):
            plan.commit()
    assert contents(outside) == {"a.txt": ABC.encode()}
    assert contents(root / "e") == {"a.txt": ABC.encode()}


def test_a_file_swapped_for_a_link_at_the_last_moment_is_replaced_not_followed(tmp_path, monkeypatch):
    secret, root = tmp_path / "secret", tmp_path / "root"
    lay(tmp_path, {"secret": ABC, "root/a.txt": ABC})
    real = os.rename

    def swap_first(src, dst, **places):
        if dst == "a.txt" and not (root / "a.txt").is_symlink() and (root / "a.txt").exists():
            (root / "a.txt").unlink()
            (root / "a.txt").symlink_to(secret)
        return real(src, dst, **places)

    with PatchFolder(root) as folder:
        plan = folder.plan(update("@@\n-b\n+B"))
        monkeypatch.setattr(os, "rename", swap_first)
        plan.commit()
    assert secret.read_text() == ABC
    assert not (root / "a.txt").is_symlink() and (root / "a.txt").read_text() == "a\nB\nc\n"


def test_a_hard_link_to_a_file_outside_leaves_that_file_alone(tmp_path):
    lay(tmp_path, {"outside.txt": ABC, "root/x": ""})
    os.link(tmp_path / "outside.txt", tmp_path / "root/a.txt")
    assert not run(tmp_path / "root", update("@@\n-b\n+B")).is_error
    assert (tmp_path / "outside.txt").read_text() == ABC


def test_what_is_no_ordinary_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for body in ("*** Update File: pipe\n@@\n-b\n+B", "*** Delete File: pipe"):
        assert "no ordinary file" in run(tmp_path, patch(body)).text


def test_a_file_that_is_too_large_is_refused(tmp_path):
    lay(tmp_path, {"a.txt": ABC})
    with PatchFolder(tmp_path, max_file_bytes=5) as folder, pytest.raises(PatchError, match="has 6 bytes; expected"):
        folder.plan(update("@@\n-b\n+B"))


@pytest.mark.parametrize("mode", [0o755, 0o600, 0o444, 0o640])
def test_a_file_keeps_its_mode(tmp_path, mode):
    lay(tmp_path, {"a.txt": ABC, "m.txt": ABC})
    for name in ("a.txt", "m.txt"):
        (tmp_path / name).chmod(mode)
    text = patch("*** Update File: a.txt\n@@\n-b\n+B\n*** Update File: m.txt\n*** Move to: n.txt\n@@\n-b\n+B")
    assert not run(tmp_path, text).is_error
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "n.txt").stat().st_mode) == mode


def test_a_file_changed_after_the_plan_is_not_overwritten(tmp_path):
    lay(tmp_path, {"a.txt": ABC, "b.txt": ABC})
    with PatchFolder(tmp_path) as folder:
        plan = folder.plan(patch("*** Delete File: b.txt\n*** Update File: a.txt\n@@\n-b\n+B"))
        (tmp_path / "a.txt").write_text("a\nx\nc\n")
        with pytest.raises(PatchError, match=r"a\.txt: was changed meanwhile.*every file is as it was"):
            plan.commit()
    assert contents(tmp_path) == {"a.txt": b"a\nx\nc\n", "b.txt": ABC.encode()}


def test_a_file_that_came_after_the_plan_is_not_overwritten(tmp_path):
    with PatchFolder(tmp_path) as folder:
        plan = folder.plan(patch("*** Add File: a\n+1\n*** Add File: d/b\n+2"))
        lay(tmp_path, {"a": "mine"})
        with pytest.raises(PatchError, match="a: came into being meanwhile"):
            plan.commit()
    assert contents(tmp_path) == {"a": b"mine"} and not (tmp_path / "d").exists()


def test_a_person_is_shown_the_diff_and_may_decline(tmp_path):
    lay(tmp_path, {"a.txt": "a\nb", "d.txt": "x\n", "m.txt": "m\n", "bin": b"\0"})
    shown = []

    async def decline(plan):
        shown.append(plan.unified_diff())
        return False

    text = patch(
        "*** Update File: a.txt\n@@\n-b\n+B\n*** Delete File: d.txt\n*** Add File: n.txt\n+1\n"
        "*** Update File: m.txt\n*** Move to: o.txt\n*** Delete File: bin"
    )
    before = look(tmp_path)
    output = run(tmp_path, text, approve=decline)
    assert output.is_error and "declined" in output.text and look(tmp_path) == before
    assert shown == [
        "--- a/a.txt\n+++ b/a.txt\n@@ -1,2 +1,2 @@\n a\n"
        "-b\n\\ No newline at end of file\n+B\n\\ No newline at end of file\n"
        "--- a/d.txt\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n"
        "--- /dev/null\n+++ b/n.txt\n@@ -0,0 +1 @@\n+1\n"
        "rename from m.txt\nrename to o.txt\n"
        "--- a/bin\n+++ /dev/null\nBinary files differ\n"
    ]


def test_the_diff_is_one_that_the_program_patch_applies(tmp_path):
    lay(tmp_path, {"a.txt": "".join(f"{i}\n" for i in range(40)), "d.txt": "x\n", "s/x": "1"})
    lay(tmp_path / "copy", contents(tmp_path))
    text = patch(
        "*** Update File: a.txt\n@@\n-3\n+three\n@@\n 30\n+30b\n*** Delete File: d.txt\n*** Add File: n/n.txt\n+1"
    )
    with PatchFolder(tmp_path / "copy") as folder:
        plan = folder.plan(text)
        diff = plan.unified_diff()
        plan.commit()
    done = subprocess.run(["git", "apply", "--unsafe-paths", "-"], input=diff, cwd=tmp_path, text=True, check=False)
    assert done.returncode == 0
    assert {k: v for k, v in contents(tmp_path).items() if not k.startswith("copy/")} == contents(tmp_path / "copy")


# All or nothing ------------------------------------------------------------------------------------------------------

MANY = {"a.txt": ABC, "b.txt": ABC, "c/d.txt": ABC, "m.txt": ABC, "gone.txt": "x\n"}
MANY_PATCH = patch(
    "*** Update File: a.txt\n@@\n-a\n+A\n*** Delete File: gone.txt\n*** Add File: x/y/new.txt\n+1\n"
    "*** Update File: m.txt\n*** Move to: z/m.txt\n@@\n-b\n+B\n*** Update File: c/d.txt\n@@\n-c\n+C"
)
MANY_DONE = {
    "a.txt": b"A\nb\nc\n",
    "b.txt": ABC.encode(),
    "x/y/new.txt": b"1\n",
    "z/m.txt": b"a\nB\nc\n",
    "c/d.txt": b"a\nb\nC\n",
}
CALLS = ["open", "write", "fsync", "link", "rename", "mkdir", "unlink", "fchmod", "stat"]


def fail_at(monkeypatch, name: str, count: int, error: BaseException) -> list[int]:
    """Let the count-th call of a function of `os` fail, and none after it: going back must work."""
    real, calls = getattr(os, name), [0]

    def failing(*args, **options):
        calls[0] += 1
        if calls[0] == count:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(os, name, failing)
    return calls


@pytest.mark.parametrize("name", CALLS)
def test_whatever_fails_the_folder_is_as_it_was(tmp_path, name):
    count = 0
    while True:
        count += 1
        root = tmp_path / str(count)
        lay(root, MANY)
        before = look(root)
        with PatchFolder(root) as folder, pytest.MonkeyPatch.context() as patched:
            plan = folder.plan(MANY_PATCH)
            calls = fail_at(patched, name, count, OSError(28, "No space left on device"))
            try:
                plan.commit()
            except PatchError as error:
                assert "every file is as it was" in error.message
                patched.undo()
                assert look(root) == before, f"{name} number {count}"
                continue
        # Either the call came too late to matter, or it was never made.
        assert contents(root) == MANY_DONE or any(path.startswith(".ossia-patch-") for path in contents(root))
        if calls[0] < count:
            break
    assert count > 1


@pytest.mark.parametrize("name", ["link", "rename", "unlink", "mkdir", "write"])
def test_a_killed_process_is_undone_by_the_next_patch(tmp_path, name):
    """A child dies, as by SIGKILL, at the n-th call of a function; what it left is tidied up by whoever comes next."""
    program = """
import os, sys
from ossia.tools.patch_files import PatchFolder
root, name, count, text = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
real, calls = getattr(os, name), [0]
def dying(*args, **options):
    calls[0] += 1
    if calls[0] == count:
        os._exit(9)
    return real(*args, **options)
with PatchFolder(root) as folder:
    plan = folder.plan(text)
    setattr(os, name, dying)
    plan.commit()
"""
    outcomes = set()
    for count in (1, 2, 3, 4, 6, 9, 14):
        root = tmp_path / str(count)
        lay(root, MANY)
        before = look(root)
        child = subprocess.run([sys.executable, "-c", program, str(root), name, str(count), MANY_PATCH], timeout=60)
        with PatchFolder(root) as folder, pytest.raises(PatchError, match="none: does not exist"):
            folder.plan(patch("*** Delete File: none"))
        after = look(root)
        if child.returncode == 9 and contents(root) != MANY_DONE:
            assert after == before
            outcomes.add("undone")
        else:
            assert contents(root) == MANY_DONE
            outcomes.add("done")
    assert "undone" in outcomes


def test_the_way_back_works_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_args, **_options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    lay(tmp_path / "good", MANY)
    with PatchFolder(tmp_path / "good") as folder:
        folder.plan(MANY_PATCH).commit()
    assert contents(tmp_path / "good") == MANY_DONE
    for count in range(1, 40):
        root = tmp_path / str(count)
        lay(root, MANY)
        before = look(root)
        with PatchFolder(root) as folder, pytest.MonkeyPatch.context() as patched:
            plan = folder.plan(MANY_PATCH)
            fail_at(patched, "fsync", count, OSError(28, "No space left on device"))
            try:
                plan.commit()
            except PatchError:
                assert look(root) == before
            else:
                break
    assert count > 10


def test_what_cannot_be_put_back_is_kept_and_named(tmp_path, monkeypatch):
    lay(tmp_path, {"a.txt": ABC, "b.txt": ABC})
    with PatchFolder(tmp_path) as folder:
        plan = folder.plan(patch("*** Update File: a.txt\n@@\n-a\n+A\n*** Delete File: b.txt"))
        real, calls = os.rename, []

        def broken(src, dst, **places):
            calls.append(dst)
            if len(calls) > 1:
                raise OSError(5, "Input/output error")
            return real(src, dst, **places)

        monkeypatch.setattr(os, "rename", broken)
        with pytest.raises(PatchError, match=r"a\.txt: cannot be put back from \.ossia-patch-.*\.old"):
            plan.commit()
        monkeypatch.undo()
        # The disk is well again: the next patch goes back first.
        with pytest.raises(PatchError, match="none: does not exist"):
            folder.plan(patch("*** Delete File: none"))
    assert contents(tmp_path) == {"a.txt": ABC.encode(), "b.txt": ABC.encode()}


def test_a_damaged_journal_harms_nothing(tmp_path):
    lay(
        tmp_path,
        {
            "root/a.txt": ABC,
            "root/.ossia-patch-0.journal": '{"entries": [["../out", "../out", "D"]], "folders": ["../dir"]}',
            "root/.ossia-patch-1.journal": '{"entries": [["a.t',
            "root/.ossia-patch-2.done": "[]",
            "root/.ossia-patch-3.journal": '{"entries": [["a.txt", "a.txt", "A"]], "folders": []}',
            "out": "mine",
            ".ossia-patch-0-0.old": "evil",
            "dir/x": "",
        },
    )
    assert not run(tmp_path / "root", update("@@\n-b\n+B")).is_error
    assert contents(tmp_path / "root") == {"a.txt": b"a\nB\nc\n"}
    assert (tmp_path / "out").read_text() == "mine" and (tmp_path / "dir").is_dir()


def test_a_cancelled_patch_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    lay(tmp_path, MANY)
    before = look(tmp_path)
    staged, go_on = threading.Event(), threading.Event()
    real = patch_files.PatchFolder._swap

    def slow(self, journal, i, step):
        if i == 2:
            staged.set()
            assert go_on.wait(20)
        real(self, journal, i, step)

    monkeypatch.setattr(patch_files.PatchFolder, "_swap", slow)

    async def cancel():
        with PatchFolder(tmp_path) as folder:
            task = asyncio.create_task(ApplyPatch(folder).run("apply_patch", MANY_PATCH))
            await asyncio.to_thread(staged.wait, 20)
            task.cancel()
            await asyncio.sleep(0)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    assert look(tmp_path) == before


def test_patches_at_the_same_time_do_not_mix(tmp_path):
    lay(tmp_path, {f"{i}.txt": ABC for i in range(12)})

    async def all_at_once():
        with PatchFolder(tmp_path) as one, PatchFolder(tmp_path) as two:
            tools = [ApplyPatch(one), ApplyPatch(two)]
            return await asyncio.gather(
                *(tools[i % 2].run("apply_patch", update("@@\n-b\n+B", f"{i}.txt")) for i in range(12))
            )

    assert not any(output.is_error for output in asyncio.run(all_at_once()))
    assert set(contents(tmp_path).values()) == {b"a\nB\nc\n"}


# The Responses API ---------------------------------------------------------------------------------------------------


def test_operations_become_calls_of_the_api_and_come_back():
    operations = parse_patch(
        patch(
            "*** Add File: n.txt\n+1\n+\n+2\n*** Delete File: d.txt\n"
            "*** Update File: a.txt\n@@ class A:\n@@ def f():\n a\n-b\n+B\n*** End of File"
        )
    )
    calls = [to_call_operation(operation) for operation in operations]
    for call in calls:
        item = {"id": "1", "call_id": "2", "type": "apply_patch_call", "status": "completed", "operation": call}
        assert ResponseApplyPatchToolCall.model_validate(item).operation.path == call["path"]
    again = tuple(from_call_operation(call) for call in calls)
    assert parse_patch(render_patch(again)) == parse_patch(render_patch(operations)) == operations


def test_the_diff_of_a_call_does_what_openais_own_client_does_with_it():
    before = "class A:\n    def f(self):\n        return 1\n\nclass B:\n    def f(self):\n        return 1\n"
    text = patch(
        "*** Update File: a\n@@ class B:\n@@     def f(self):\n-        return 1\n+        return 2\n"
        "*** Add File: n\n+1\n+2"
    )
    changed, added = (to_call_operation(operation) for operation in parse_patch(text))
    assert apply_diff(before, changed["diff"]) == before[:-9] + "return 2\n"
    assert apply_diff("", added["diff"], mode="create") == "1\n2"


def test_a_move_is_no_call_of_the_api():
    [operation] = parse_patch(patch("*** Update File: a\n*** Move to: b"))
    with pytest.raises(PatchError, match="cannot be moved here; delete it and add b"):
        to_call_operation(operation)


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ({}, "type is None"),
        ({"type": "move_file", "path": "a"}, "type is 'move_file'"),
        ({"type": "delete_file"}, "path is None"),
        ({"type": "update_file", "path": "a"}, "diff is None"),
        ({"type": "delete_file", "path": "../a"}, "has '..'"),
        ({"type": "update_file", "path": "a", "diff": "*** Delete File: b"}, "has no hunk"),
        ({"type": "update_file", "path": "a", "diff": "@@\n-a\n+b\n*** Delete File: b"}, "goes on to 'b'"),
        ({"type": "create_file", "path": "a", "diff": "x"}, "line 1 of the patch"),
    ],
)
def test_a_call_of_the_api_that_cannot_be_read_is_refused(operation, said):
    with pytest.raises(InputError, match=said):
        from_call_operation(operation)


def test_the_output_of_a_call_becomes_words():
    assert call_output_text({"status": "completed", "output": "ok"}) == "ok"
    assert call_output_text({"status": "completed", "output": None}) == "Done!"
    assert call_output_text({"status": "failed"}).startswith("Error")


# Whatever comes ------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0"), max_size=8)
distinct = st.lists(texts, unique_by=lambda t: t.strip(), max_size=24)


def hunks_between(old: list[str], new: list[str], context: int) -> str:
    """A patch from one list of lines to another, with ``context`` lines around each change."""
    out = []
    for group in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_grouped_opcodes(context):
        out.append("@@")
        for tag, i, j, k, m in group:
            if tag == "equal":
                out += [" " + line for line in old[i:j]]
            else:
                out += ["-" + line for line in old[i:j]] + ["+" + line for line in new[k:m]]
    return "\n".join(out)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), ending=st.sampled_from(["\n", "\r\n"]), final=st.booleans(), context=st.integers(1, 3))
def test_a_patch_made_of_two_texts_turns_one_into_the_other(tmp_path, data, ending, final, context):
    old = data.draw(distinct.filter(lambda lines: lines and lines[-1]))
    new = list(old)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(new)))
        if data.draw(st.booleans()) and at < len(new):
            del new[at]
        else:
            new.insert(at, data.draw(texts))
    assume(old != new and new and new[-1])
    # One line alone does not tell how lines are ended here.
    assume(final or len(old) > 1)
    # A byte order mark is kept whatever the patch says.
    assume(not (old[0] + new[0]).count("\ufeff"))
    root = tmp_path / os.urandom(8).hex()

    def text(lines: list[str]) -> bytes:
        return (ending.join(lines) + (ending if final else "")).encode()

    lay(root, {"a.txt": text(old)})
    output = run(root, update(hunks_between(old, new, context)))
    assert not output.is_error, output.text
    assert contents(root) == {"a.txt": text(new)}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(st.sampled_from(["a", "b", "d/c", "d/e/f"]), texts.map(lambda t: t + "\nx\n"), min_size=1),
    operations=st.lists(
        st.one_of(
            st.builds(Add, st.sampled_from(["a", "n", "d/n", "d"]), st.lists(texts).map(tuple)),
            st.builds(Delete, st.sampled_from(["a", "b", "d/c", "q"])),
            st.builds(
                Update,
                st.sampled_from(["a", "b", "d/e/f"]),
                st.just((Hunk((HunkLine("-", "x"), HunkLine("+", "y"))),)),
                st.sampled_from([None, None, "m", "d/m", "b"]),
            ),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_a_patch_is_done_as_a_whole_or_not_at_all(tmp_path, files, operations):
    root = tmp_path / os.urandom(8).hex()
    root.mkdir()
    lay(root, files)
    before = look(root)
    output = run(root, render_patch(operations))
    if output.is_error:
        assert look(root) == before
        return
    wanted = {path: text.encode() for path, text in files.items()}
    for operation in operations:
        if isinstance(operation, Add):
            wanted[operation.path] = operation.text.encode()
        else:
            data = wanted.pop(operation.path)
            if isinstance(operation, Update):
                head, _, _ = data.rpartition(b"x\n")
                wanted[operation.move_to or operation.path] = head + b"y\n"
    assert contents(root) == wanted


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from(" +-@*\n\rab\\.:") | st.sampled_from("\ud800\x00\u2028"), max_size=60))
def test_no_text_makes_the_reader_raise_anything_but_its_own_error(text):
    for wrapped in (text, patch(text), update(text), patch("*** Add File: a\n" + text)):
        try:
            operations = parse_patch(wrapped)
        except PatchError:
            continue
        assert _unplaced(parse_patch(render_patch(operations))) == _unplaced(operations)


def _unplaced(operations):
    """Without the lines of the patch that the hunks began at."""
    return [
        replace(op, hunks=tuple(replace(hunk, line=0) for hunk in op.hunks)) if isinstance(op, Update) else op
        for op in operations
    ]


@given(text=st.text())
def test_lines_joined_are_the_text(text):
    assert "".join(line.text + line.ending for line in split_lines(text)) == text
