"""Patches with the folder they meet and the folder that must come of it, or the words that refuse them.

A folder is {path: content}; content is a text, or bytes where it is no UTF-8. ``after`` None: nothing may change.
"""

# A case to a line, as far as it goes.
# ruff: noqa: E501

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    why: str
    before: dict[str, str | bytes]
    patch: str
    after: dict[str, str | bytes] | None = None
    said: str = "Success. Updated the following files:\n"

    def __str__(self) -> str:
        return self.why.replace(" ", "_")


def patch(body: str) -> str:
    return f"*** Begin Patch\n{body}\n*** End Patch"


def update(hunks: str, path: str = "a.txt") -> str:
    return patch(f"*** Update File: {path}\n{hunks}")


ABC = "a\nb\nc\n"
TWO = "class A:\n    def f(self):\n        return 1\n\nclass B:\n    def f(self):\n        return 1\n"

APPLIED = [
    Case("add a file", {}, patch("*** Add File: bar.md\n+This is a new file"), {"bar.md": "This is a new file\n"}),
    Case("add a file in new folders", {}, patch("*** Add File: x/y/z.txt\n+a\n+"), {"x/y/z.txt": "a\n\n"}),
    Case("add an empty file", {}, patch("*** Add File: __init__.py"), {"__init__.py": ""}),
    Case("add a file without a final newline", {}, patch("*** Add File: a\n+x\n\\ No newline at end of file"), {"a": "x"}),
    Case("add then a blank line then another", {}, patch("*** Add File: a\n+x\n\n*** Add File: b\n+y"),
         {"a": "x\n", "b": "y\n"}),
    Case("add with a needless end of file", {}, patch("*** Add File: a\n+x\n*** End of File"), {"a": "x\n"}),
    Case("add lines that look like markers", {}, patch("*** Add File: a\n+*** End Patch\n+@@\n++1\n+-1"),
         {"a": "*** End Patch\n@@\n+1\n-1\n"}),
    Case("add a file beside folders of its name's beginning", {"x/a": ""}, patch("*** Add File: x.txt\n+1"),
         {"x/a": "", "x.txt": "1\n"}),
    Case("several operations", {"m.txt": "line1\nline2\n", "d.txt": "obsolete\n"},
         patch("*** Add File: nested/new.txt\n+created\n*** Delete File: d.txt\n"
               "*** Update File: m.txt\n@@\n-line2\n+changed"),
         {"nested/new.txt": "created\n", "m.txt": "line1\nchanged\n"}),
    Case("several hunks", {"a.txt": "1\n2\n3\n4\n"}, update("@@\n-2\n+two\n@@\n-4\n+four"), {"a.txt": "1\ntwo\n3\nfour\n"}),
    Case("adjoining hunks", {"a.txt": ABC}, update("@@\n-a\n+A\n@@\n-b\n+B"), {"a.txt": "A\nB\nc\n"}),
    Case("one hunk that changes two places", {"a.txt": ABC}, update("@@\n-a\n+A\n b\n-c\n+C"), {"a.txt": "A\nb\nC\n"}),
    Case("the first hunk without @@", {"a.txt": ABC}, update(" a\n-b\n+B"), {"a.txt": "a\nB\nc\n"}),
    Case("move to a new folder", {"old/n.txt": "old\n", "old/o.txt": "o\n"},
         patch("*** Update File: old/n.txt\n*** Move to: new/dir/n.txt\n@@\n-old\n+new"),
         {"old/o.txt": "o\n", "new/dir/n.txt": "new\n"}),
    Case("move alone", {"a.txt": "x"}, patch("*** Update File: a.txt\n*** Move to: b.txt"), {"b.txt": "x"}),
    Case("move a binary file", {"a": b"\x00\xff"}, patch("*** Update File: a\n*** Move to: b"), {"b": b"\x00\xff"}),
    Case("delete", {"a": "1", "b": "2"}, patch("*** Delete File: a"), {"b": "2"}),
    Case("delete a binary file", {"a": b"\xff\x00"}, patch("*** Delete File: a"), {}),
    Case("lines that only come go to the end", {"a.txt": "1\n2\n"}, update("@@\n+3\n+4"), {"a.txt": "1\n2\n3\n4\n"}),
    Case("lines that only come below a header", {"a.txt": "def f():\n    pass\n\ndef g():\n    pass\n"},
         update("@@ def g():\n+    # here"), {"a.txt": "def f():\n    pass\n\ndef g():\n    # here\n    pass\n"}),
    Case("lines that only come to an empty file", {"a.txt": ""}, update("@@\n+x"), {"a.txt": "x\n"}),
    Case("lines that only go", {"a.txt": ABC}, update("@@\n a\n-b\n c"), {"a.txt": "a\nc\n"}),
    Case("all lines go", {"a.txt": ABC}, update("@@\n-a\n-b\n-c"), {"a.txt": ""}),
    Case("the marker of the file's end chooses the last place", {"a.txt": "x\ny\nx\n"},
         update("@@\n-x\n+z\n*** End of File"), {"a.txt": "x\ny\nz\n"}),
    Case("a header chooses the function", {"a.txt": TWO}, update("@@ class B:\n-        return 1\n+        return 2"),
         {"a.txt": TWO[:-9] + "return 2\n"}),
    Case("nested headers", {"a.txt": TWO}, update("@@ class B:\n@@     def f(self):\n-        return 1\n+        return 2"),
         {"a.txt": TWO[:-9] + "return 2\n"}),
    Case("nested headers with other blanks", {"a.txt": TWO}, update("@@ class B:\n@@ \t def f(self):\n-return 1\n+  2"),
         {"a.txt": TWO[:-17] + "  2\n"}),
    Case("a header repeated by the next hunk", {"a.txt": "class A:\n    x = 1\n    y = 2\n"},
         update("@@ class A:\n-    x = 1\n+    x = 3\n@@ class A:\n-    y = 2\n+    y = 4"),
         {"a.txt": "class A:\n    x = 3\n    y = 4\n"}),
    Case("half a header", {"a.txt": "def f(a, b):\n    return 1\n\ndef g():\n    return 1\n"},
         update("@@ def g\n-    return 1\n+    return 2"),
         {"a.txt": "def f(a, b):\n    return 1\n\ndef g():\n    return 2\n"}),
    Case("git's line numbers", {"a.txt": ABC}, update("@@ -1,3 +1,3 @@\n a\n-b\n+B\n c"), {"a.txt": "a\nB\nc\n"}),
    Case("git's line numbers with a function", {"a.txt": TWO}, update("@@ -5,2 +5,2 @@ class B:\n-        return 1\n+    2"),
         {"a.txt": TWO[:-17] + "    2\n"}),
    Case("context without its trailing blanks", {"a.txt": "a  \nb\t\nc\n"}, update("@@\n a\n-b\n+B\n c"),
         {"a.txt": "a  \nB\nc\n"}),
    Case("context without its indentation", {"a.txt": "  a\n    b\n"}, update("@@\n a\n-b\n+    B"), {"a.txt": "  a\n    B\n"}),
    Case("typographic punctuation", {"a.txt": "say “yes” – it’s\u00a0ok\nb\n"},
         update("@@\n say \"yes\" - it's ok\n-b\n+B"), {"a.txt": "say “yes” – it’s\u00a0ok\nB\n"}),
    Case("an exact place before a loose one", {"a.txt": "  x\nx\n"}, update("@@\n-x\n+y"), {"a.txt": "  x\ny\n"}),
    Case("a blank line of context without its blank", {"a.txt": "a\n\nb\n"}, update("@@\n a\n\n-b\n+B"), {"a.txt": "a\n\nB\n"}),
    Case("a blank line behind the last hunk", {"a.txt": ABC}, update("@@\n-c\n+C\n"), {"a.txt": "a\nb\nC\n"}),
    Case("CRLF is kept", {"a.txt": "a\r\nb\r\nc\r\n"}, update("@@\n a\n-b\n+B\n+X\n c"), {"a.txt": "a\r\nB\r\nX\r\nc\r\n"}),
    Case("mixed line breaks are kept", {"a.txt": "a\r\nb\nc\r\nd\n"}, update("@@\n-b\n+B\n-c\n+C\n+X\n d"),
         {"a.txt": "a\r\nB\nC\r\nX\r\nd\n"}),
    Case("a patch with CRLF for a file with LF", {"a.txt": ABC}, update("@@\n-b\n+B").replace("\n", "\r\n"),
         {"a.txt": "a\nB\nc\n"}),
    Case("a patch with CRLF for a file with CRLF", {"a.txt": "a\r\nb\r\n"}, update("@@\n-b\n+B").replace("\n", "\r\n") + "\r\n",
         {"a.txt": "a\r\nB\r\n"}),
    Case("a lone carriage return is text", {"a.txt": "a\rb\nc\n"}, update("@@\n a\rb\n-c\n+C"), {"a.txt": "a\rb\nC\n"}),
    Case("a missing final newline is kept", {"a.txt": "a\nb"}, update("@@\n-b\n+B"), {"a.txt": "a\nB"}),
    Case("a missing final newline is kept by what is added", {"a.txt": "a\nb"}, update("@@\n b\n+c"), {"a.txt": "a\nb\nc"}),
    Case("a final newline comes when it is said", {"a.txt": "a\nb"},
         update("@@\n-b\n\\ No newline at end of file\n+b"), {"a.txt": "a\nb\n"}),
    Case("a final newline goes when it is said", {"a.txt": "a\nb\n"},
         update("@@\n-b\n+b\n\\ No newline at end of file"), {"a.txt": "a\nb"}),
    Case("U+2028 and form feed break no line", {"a.txt": "a\u2028b\fc\x85d\nx\n"}, update("@@\n a\u2028b\fc\x85d\n-x\n+y\u2029z"),
         {"a.txt": "a\u2028b\fc\x85d\ny\u2029z\n"}),
    Case("a byte order mark is kept", {"a.txt": "\ufeffa\nb\n"}, update("@@\n-a\n+A\n b"), {"a.txt": "\ufeffA\nb\n"}),
    Case("a byte order mark in the patch as well", {"a.txt": "\ufeffa\nb\n"}, update("@@\n \ufeffa\n-b\n+B"),
         {"a.txt": "\ufeffa\nB\n"}),
    Case("other scripts", {"a.txt": "größe = 1\n名前 = 2\n"}, update("@@\n größe = 1\n-名前 = 2\n+名前 = '🎵'"),
         {"a.txt": "größe = 1\n名前 = '🎵'\n"}),
    Case("a path with blanks and letters", {"ein ordner/ä b.txt": "x\n"}, update("@@\n-x\n+y", "ein ordner/ä b.txt"),
         {"ein ordner/ä b.txt": "y\n"}),
    Case("a path with needless parts", {"d/a.txt": "x\n"}, update("@@\n-x\n+y", "./d//./a.txt"), {"d/a.txt": "y\n"}),
    Case("a heredoc around it", {"a.txt": ABC}, "apply_patch <<'EOF'\n" + update("@@\n-b\n+B") + "\nEOF\n", {"a.txt": "a\nB\nc\n"}),
    Case("a bare heredoc around it", {"a.txt": ABC}, '<<"PATCH"\n' + update("@@\n-b\n+B") + "\nPATCH", {"a.txt": "a\nB\nc\n"}),
    Case("a code fence around it", {"a.txt": ABC}, "```diff\n" + update("@@\n-b\n+B") + "\n```\n", {"a.txt": "a\nB\nc\n"}),
    Case("a fence around a heredoc", {"a.txt": ABC}, "```bash\napply_patch <<'X'\n" + update("@@\n-b\n+B") + "\nX\n```",
         {"a.txt": "a\nB\nc\n"}),
    Case("blank lines around it", {"a.txt": ABC}, "\n\n" + update("@@\n-b\n+B") + "\n\n\n", {"a.txt": "a\nB\nc\n"}),
    Case("blanks around its markers", {"a.txt": ABC},
         "  *** Begin Patch  \n  *** Update File: a.txt \n@@\n-b\n+B\n *** End Patch ", {"a.txt": "a\nB\nc\n"}),
    Case("context that looks like a marker", {"a.txt": "*** End Patch\nx\n"}, update("@@\n *** End Patch\n-x\n+y"),
         {"a.txt": "*** End Patch\ny\n"}),
    Case("a JSON string", {"a.txt": ABC}, '"*** Begin Patch\\n*** Update File: a.txt\\n@@\\n-b\\n+B\\n*** End Patch"',
         {"a.txt": "a\nB\nc\n"}),
    Case("a JSON object", {"a.txt": ABC},
         '{"input": "*** Begin Patch\\n*** Update File: a.txt\\n@@\\n-b\\n+B\\n*** End Patch\\n"}', {"a.txt": "a\nB\nc\n"}),
    Case("the words of a command in JSON", {"a.txt": ABC},
         '{"cmd": ["apply_patch", "*** Begin Patch\\n*** Delete File: a.txt\\n*** End Patch"]}', {}),
]  # fmt: skip

REFUSED = [
    Case("no patch at all", {}, "", said="the patch is empty"),
    Case("prose", {}, "Sure, here it is!", said="expected the line '*** Begin Patch'"),
    Case("an empty patch", {"a": "x"}, "*** Begin Patch\n*** End Patch", said="the patch is empty"),
    Case("a patch cut off", {"a.txt": ABC}, "*** Begin Patch\n*** Update File: a.txt\n@@\n-b\n+B", said="was it cut off"),
    Case("only its beginning", {}, "*** Begin Patch", said="was it cut off"),
    Case("an unknown operation", {"a": "x"}, patch("*** Frobnicate File: a"), said="'*** Frobnicate File: a' is no operation"),
    Case("an update without hunks", {"a.txt": ABC}, patch("*** Update File: a.txt"), said="has no hunk"),
    Case("a hunk without lines", {"a.txt": ABC}, update("@@\n@@"), said="the hunk has no lines"),
    Case("a line without its sign", {"a.txt": ABC}, update("@@\n-b\nB"), said="line 5 of the patch: 'B' begins with 'B'"),
    Case("a new file without signs", {}, patch("*** Add File: a\nhello"), said="every line of a to begin with '+'"),
    Case("context that is not there", {"a.txt": "line1\nline2\n"}, update("@@\n-missing\n+x"),
         said="hunk 1 of 1 (line 3 of the patch): its lines are not in the file"),
    Case("the nearest lines are shown", {"a.txt": "".join(f"line {i}\n" for i in range(50))},
         update("@@\n line 30\n-line 31 \t!\n+x\n line 32"), said="line 32 is 'line 31'. The nearest lines of the file:\n"),
    Case("a file that ends too early", {"a.txt": ABC}, update("@@\n b\n c\n-d"), said="the file ends after line 3, where 'd'"),
    Case("an empty file", {"a.txt": ""}, update("@@\n-d\n+e"), said="the file is empty"),
    Case("a header that is not there", {"a.txt": TWO}, update("@@ class C:\n-        return 1\n+x"),
         said="no line of the file is the header 'class C:'"),
    Case("an inner header that is not there", {"a.txt": TWO}, update("@@ class B:\n@@ def g():\n-        return 1\n+x"),
         said="no line of the file is the header 'def g():'"),
    Case("an inner header that is above the outer", {"a.txt": "def g():\n  1\nclass B:\n  2\n"},
         update("@@ class B:\n@@ def g():\n-  2\n+x"), said="below 'class B:' no line of the file is the header 'def g():'"),
    Case("two places", {"a.txt": TWO}, update("@@\n-        return 1\n+        return 2"),
         said="its lines fit 2 places, at lines 3, 7 of the file"),
    Case("two places below like headers", {"a.txt": TWO}, update("@@ def f(self):\n-        return 1\n+        return 2"),
         said="its lines fit 2 places"),
    Case("many places", {"a.txt": "x\n" * 40}, update("@@\n-x\n+y"), said="at lines 1, 2, 3, 4, 5 and 35 more"),
    Case("hunks out of order", {"a.txt": ABC}, update("@@\n-c\n+C\n@@\n-a\n+A"), said="hunk 2 of 2 (line 6 of the patch): its lines are at line 1"),
    Case("an end that is not the end", {"a.txt": ABC}, update("@@\n-a\n+A\n*** End of File"), said="the file has 3"),
    Case("no newline where the file goes on", {"a.txt": ABC}, update("@@\n-a\n+A\n\\ No newline at end of file"),
         said="where the file goes on with line 2"),
    Case("nothing changes", {"a.txt": ABC}, update("@@\n-a\n+a"), said="the update changes nothing"),
    Case("context alone changes nothing", {"a.txt": ABC}, update("@@\n a\n b"), said="the update changes nothing"),
    Case("a missing file to update", {"src/main.py": "x\n"}, update("@@\n-x\n+y", "src/mian.py"),
         said="src/mian.py: does not exist; is it src/main.py?"),
    Case("a missing file to delete", {}, patch("*** Delete File: a"), said="a: does not exist"),
    Case("a missing folder", {}, patch("*** Delete File: x/y/a"), said="x/y/a: does not exist"),
    Case("add over a file", {"a": "old\n"}, patch("*** Add File: a\n+new"), said="a: exists already"),
    Case("add over a folder", {"a/b": ""}, patch("*** Add File: a\n+new"), said="a: exists already"),
    Case("move over a file", {"a": "1", "b": "2"}, patch("*** Update File: a\n*** Move to: b"), said="b: exists already"),
    Case("move onto itself", {"a": "1\n"}, patch("*** Update File: a\n*** Move to: ./a\n@@\n-1\n+2"), said="moved onto itself"),
    Case("delete a folder", {"d/a": ""}, patch("*** Delete File: d"), said="d: is a folder"),
    Case("update a folder", {"d/a": ""}, update("@@\n+x", "d"), said="d: is a folder"),
    Case("a file as a folder", {"d": ""}, patch("*** Add File: d/x\n+1"), said="d is a file; expected a folder"),
    Case("a path that ends as a folder", {"a.txt": ABC}, update("@@\n-a\n+A", "a.txt/"), said="is a folder; expected a file"),
    Case("two operations on one path", {"a.txt": ABC}, patch("*** Delete File: a.txt\n*** Add File: a.txt\n+x"),
         said="a.txt: has two operations"),
    Case("two updates of one path", {"a.txt": ABC},
         patch("*** Update File: a.txt\n@@\n-a\n+A\n*** Update File: ./a.txt\n@@\n-b\n+B"), said="a.txt: has two operations"),
    Case("a chain of moves", {"a": "1", "b": "2"},
         patch("*** Update File: b\n*** Move to: c\n*** Update File: a\n*** Move to: b"), said="b: has two operations"),
    Case("a file and a folder of one name", {}, patch("*** Add File: x\n+1\n*** Add File: x/y\n+2"), said="not both"),
    Case("a path that is missing", {}, patch("*** Add File:  \n+1"), said="line 2 of the patch: the path is missing"),
    Case("an absolute path", {}, patch("*** Add File: /tmp/evil\n+1"), said="is absolute"),
    Case("an absolute path of Windows", {}, patch("*** Add File: C:\\evil\n+1"), said="is absolute"),
    Case("a path that climbs out", {}, patch("*** Add File: ../evil\n+1"), said="has '..'"),
    Case("a path that climbs out in the middle", {"d/a": ""}, patch("*** Add File: d/../../evil\n+1"), said="has '..'"),
    Case("a move that climbs out", {"a": "1"}, patch("*** Update File: a\n*** Move to: ../b"), said="has '..'"),
    Case("a path with a control character", {}, patch("*** Add File: a\x1b[2J\n+1"), said="control character"),
    Case("a path that is too long", {}, patch(f"*** Add File: {'x' * 300}\n+1"), said="File name too long"),
    Case("the hooks of git", {}, patch("*** Add File: .git/hooks/pre-commit\n+evil"), said="'.git' is not to be patched"),
    Case("the hooks of git in capitals", {}, patch("*** Add File: sub/.GIT/config\n+evil"), said="is not to be patched"),
    Case("names of our own", {}, patch("*** Add File: .ossia-patch-1.journal\n+{}"), said="is not to be patched"),
    Case("latin-1", {"a.txt": b"caf\xe9\nb\n"}, update("@@\n-b\n+B"), said="is not UTF-8 (byte 0xe9 in line 1)"),
    Case("UTF-16", {"a.txt": "a\nb\n".encode("utf-16")}, update("@@\n-b\n+B"), said="is binary"),
    Case("a binary file", {"a.txt": b"a\x00\nb\n"}, update("@@\n-b\n+B"), said="is binary (it has a zero byte)"),
    Case("half a character", {"a.txt": ABC}, update("@@\n-b\n+\ud800"), said="half a character"),
    Case("one of several does not fit", {"a.txt": ABC, "b.txt": ABC},
         patch("*** Add File: new/c.txt\n+1\n*** Update File: a.txt\n@@\n-a\n+A\n*** Update File: b.txt\n@@\n-x\n+y\n"
               "*** Delete File: none"), said="b.txt, hunk 1 of 1 (line 9 of the patch)"),
    Case("broken JSON", {"a.txt": ABC}, '{"input": "*** Begin Patch', said="not valid JSON"),
    Case("JSON with two texts", {}, '{"a": "x", "b": "y"}', said="hold 2 texts"),
]  # fmt: skip
