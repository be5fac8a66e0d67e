"""Names that built-ins and third parties answer to, found through entry points."""

import difflib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from quantkit.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """One entry-point group: a name gives the object, a broken plug-in is listed with its error.

    Built-ins win over a plug-in of the same name, so that installing a package never changes what a name means.
    A built-in may be given as "module:attribute"; it is imported when first asked for.

    Args:
        group: the entry points' group.
        noun: what is registered, for messages.
        builtin: name → object, or where it is.
        check: says in a few words what a plug-in's object is instead of what it should be; "" where it is fine.
    """

    def __init__(
        self,
        *,
        group: str,
        noun: str,
        builtin: Mapping[str, T | str],
        check: Callable[[object], str] = lambda loaded: "",
    ) -> None:
        self.group = group
        self.noun = noun
        self._builtin = dict(builtin)
        self._check = check

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        return sorted({*self._builtin, *self._plugins()})

    def get(self, name: str) -> T:
        """Return what is registered as `name`.

        Raises:
            UnknownNameError: the name is unknown, or its plug-in does not import or is something else.
        """
        if name in self._builtin:
            return self._load_builtin(name)
        plugins = self._plugins()
        if name not in plugins:
            raise UnknownNameError(self._unknown(name))
        try:
            loaded: T = plugins[name].load()
            wrong = self._check(loaded)
        except Exception as error:
            raise UnknownNameError(
                f"{self.noun} {name}: its plug-in {plugins[name].value} does not load "
                f"({in_one_line(error)}); mend or uninstall that package."
            ) from error
        if wrong:
            raise UnknownNameError(
                f"{self.noun} {name}: its plug-in {plugins[name].value} {wrong}; mend or uninstall that package."
            )
        return loaded

    def status(self) -> dict[str, str]:
        """Return every name with "" where it loads, else with the error that its plug-in raises.

        A plug-in that has a built-in's name is listed as "name (module:attribute)".
        """
        found = {}
        for name in self.names():
            try:
                self.get(name)
                found[name] = ""
            except UnknownNameError as error:
                found[name] = str(error)
        for entry in entry_points(group=self.group):
            # quantkit's own package lists its built-ins too.
            if entry.name in self._builtin and not entry.value.startswith("quantkit."):
                found[f"{entry.name} ({entry.value})"] = "ignored: a built-in has this name"
        return found

    def _load_builtin(self, name: str) -> T:
        value = self._builtin[name]
        if isinstance(value, str):
            loaded: T = EntryPoint(name=name, value=value, group=self.group).load()
            self._builtin[name] = loaded
            return loaded
        return value

    def _plugins(self) -> dict[str, EntryPoint]:
        return {e.name: e for e in entry_points(group=self.group) if e.name not in self._builtin}

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(self.names())}."
        return f"{self.noun} {name}: no such {self.noun}; {hint}"


def in_one_line(error: BaseException) -> str:
    """Return an error of somebody else's code as "Type: message" without line breaks."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text.rstrip('.')}" if text else type(error).__name__
