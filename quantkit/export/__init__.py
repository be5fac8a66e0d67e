"""Emitters: a plan becomes a model file for one target."""

from quantkit.export.base import Emitter, get_emitter, list_emitters

__all__ = ["Emitter", "get_emitter", "list_emitters"]
