"""What a notebook shows: rich forms of values, figures, and the names that notebooks are used to.

`IPython.display` is answered here, since the real one shows pictures only to its own shell.
"""

from __future__ import annotations

import base64
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import pprint
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

Bundle = dict[str, bytes]

_METHODS = {
    "text/html": "_repr_html_",
    "text/markdown": "_repr_markdown_",
    "text/latex": "_repr_latex_",
    "application/json": "_repr_json_",
    "image/svg+xml": "_repr_svg_",
    "image/png": "_repr_png_",
    "image/jpeg": "_repr_jpeg_",
}
_LINE_WIDTH = 79
_CONTAINERS = (dict, list, tuple, set, frozenset)


def bundle(value: Any) -> Bundle:
    """The forms of a value by MIME type; there is always text/plain. Raises what the value's own repr raises."""
    forms: dict[str, Any] = {}
    own = getattr(value, "_repr_mimebundle_", None)
    if callable(own) and not isinstance(value, type):
        made = own(include=None, exclude=None)
        forms.update((made[0] if isinstance(made, tuple) else made) or {})
    for mime, name in _METHODS.items():
        method = None if isinstance(value, type) else getattr(value, name, None)
        if mime not in forms and callable(method):
            try:
                made = method()
            # A broken picture must not hide the value.
            except Exception:
                continue
            if made is not None:
                forms[mime] = made[0] if isinstance(made, tuple) else made
    if _is_figure(value):
        forms.setdefault("image/png", figure_png(value))
    forms.setdefault("text/plain", plain(value))
    return {mime: data for mime, form in forms.items() if (data := _encoded(mime, form)) is not None}


def plain(value: Any) -> str:
    """As the shell prints it: containers that do not fit a line are broken up."""
    text = repr(value)
    if type(value) in _CONTAINERS and (len(text) > _LINE_WIDTH or "\n" in text):
        text = pprint.pformat(value, width=_LINE_WIDTH, sort_dicts=False)
    return text


def open_figures() -> list[Any]:
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    return [pyplot.figure(number) for number in pyplot.get_fignums()]


def close_figures() -> None:
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


def figure_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the modules of `make_modules` when they are first imported."""

    def __init__(self, show: Callable[[Any], None]) -> None:
        self._makers = make_modules(show)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._makers:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=name == "IPython")

    def exec_module(self, module: types.ModuleType) -> None:
        self._makers[module.__name__](module)


def make_modules(show: Callable[[Any], None]) -> dict[str, Callable[[types.ModuleType], None]]:
    def display(*values: Any, **_: Any) -> None:
        for value in values:
            show(value)

    def figures(module: types.ModuleType) -> None:
        """matplotlib's backend: `plt.show()` hands the figures out and closes them."""
        from matplotlib.backend_bases import FigureManagerBase
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        class FigureManager(FigureManagerBase):  # type: ignore[misc, unused-ignore]
            @classmethod
            def pyplot_show(cls, *, block: bool | None = None) -> None:
                for figure in open_figures():
                    show(figure)
                close_figures()

        class FigureCanvas(FigureCanvasAgg):  # type: ignore[misc, unused-ignore]
            manager_class = FigureManager

        vars(module).update(FigureCanvas=FigureCanvas, FigureManager=FigureManager)

    def shell(module: types.ModuleType) -> None:
        vars(module).update(get_ipython=lambda: None, version_info=(8, 0, 0), __version__="8.0.0", display=displayed)

    displayed = types.ModuleType("IPython.display")

    def display_module(module: types.ModuleType) -> None:
        vars(module).update(_display_names(display))
        vars(displayed).update(vars(module))

    def core(module: types.ModuleType) -> None:
        module.__path__ = []

    return {
        "ossia_figures": figures,
        "IPython": shell,
        "IPython.display": display_module,
        "IPython.core": core,
        "IPython.core.display": display_module,
    }


def _display_names(display: Callable[..., None]) -> dict[str, Any]:
    def wrapper(name: str, mime: str) -> type:
        def __init__(
            self: Any, data: Any = None, url: str | None = None, filename: str | None = None, **_: Any
        ) -> None:
            if filename is not None:
                with open(filename, "rb") as file:
                    data = file.read()
            if data is None:
                raise ValueError(f"{name} needs data or a file name here: nothing can be fetched from an address")
            self.data = data

        def _repr_mimebundle_(self: Any, **_: Any) -> dict[str, Any]:
            kind = mime
            if name == "Image" and isinstance(self.data, bytes) and self.data[:3] == b"\xff\xd8\xff":
                kind = "image/jpeg"
            return {kind: self.data, "text/plain": f"<IPython.core.display.{name} object>"}

        return type(name, (), {"__init__": __init__, "_repr_mimebundle_": _repr_mimebundle_})

    kinds = {
        **{"HTML": "text/html", "Markdown": "text/markdown", "Latex": "text/latex", "Math": "text/latex"},
        **{"Image": "image/png", "SVG": "image/svg+xml", "JSON": "application/json", "Javascript": "text/plain"},
    }
    names: dict[str, Any] = {name: wrapper(name, mime) for name, mime in kinds.items()}
    return names | {
        "display": display,
        "clear_output": lambda wait=False: None,
        "Pretty": wrapper("Pretty", "text/plain"),
    }


def _is_figure(value: Any) -> bool:
    figure = sys.modules.get("matplotlib.figure")
    return figure is not None and isinstance(value, figure.Figure)


def _encoded(mime: str, form: Any) -> bytes | None:
    if isinstance(form, bytes | bytearray):
        return bytes(form)
    if isinstance(form, str):
        if mime.startswith("image/") and mime != "image/svg+xml":
            try:
                return base64.b64decode(form)
            except ValueError:
                return None
        return form.encode("utf-8", "replace")
    try:
        return json.dumps(form, default=repr).encode("ascii")
    except (ValueError, RecursionError):
        return None
