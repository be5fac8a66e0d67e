"""Emitters: a plan becomes a model file, or a folder, for one target."""

from quantkit.export.base import Emitter, FolderEmitter, get_emitter, list_emitters

__all__ = ["Emitter", "FolderEmitter", "get_emitter", "list_emitters"]
