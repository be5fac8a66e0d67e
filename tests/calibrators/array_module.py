"""An array module that is not NumPy, with CuPy's manners: an array of it and one of NumPy never meet by accident."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class Elsewhere(NDArrayOperatorsMixin):
    """An array that lies elsewhere: NumPy gets at it by `get` alone."""

    def __init__(self, held: np.ndarray) -> None:
        self.held = held

    def get(self) -> np.ndarray:
        """Copy it here."""
        return self.held.copy()

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("an array from elsewhere becomes NumPy's by get alone")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        return _shown(getattr(ufunc, method)(*_held(inputs), **_held(options)))

    def __array_function__(self, func: Callable[..., Any], _: Any, args: Any, options: Any) -> Any:
        return _shown(func(*_held(args), **_held(options)))

    def __getitem__(self, index: Any) -> Any:
        return _shown(self.held[_held(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.held[_held(index)] = _held(value)

    def __float__(self) -> float:
        return float(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # by __array_interface__ NumPy would reach in
        found = getattr(self.held, name)
        if not callable(found):
            return _shown(found)
        return lambda *args, **options: _shown(found(*_held(args), **_held(options)))


class Module:
    """NumPy's functions, for arrays that lie elsewhere."""

    def __getattr__(self, name: str) -> Any:
        if name == "linalg":
            return _Functions(np.linalg)
        return getattr(_Functions(np), name)

    def asarray(self, values: Any, dtype: Any = None) -> Elsewhere:
        """Bring an array there: the one way."""
        return Elsewhere(np.array(values.held if isinstance(values, Elsewhere) else values, dtype))


class _Functions:
    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if not callable(found) or isinstance(found, type):
            return found
        return lambda *args, **options: _shown(found(*_held(args), **_held(options)))


def _held(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.held
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("an array of NumPy among those from elsewhere: bring it there by asarray")
    if isinstance(value, tuple | list):
        return type(value)(_held(v) for v in value)
    if isinstance(value, dict):
        return {k: _held(v) for k, v in value.items()}
    return value


def _shown(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, Elsewhere):
        return Elsewhere(np.asarray(value))
    return (
        tuple(_shown(v) for v in value)
        if isinstance(value, tuple) and not hasattr(value, "_fields")
        else value
    )
