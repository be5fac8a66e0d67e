"""ONNX graphs: load and clean them, tell their fingerprint, find where they can be quantized."""

from quantkit.graph.load import ModelLike, load_graph
from quantkit.graph.model import Graph
from quantkit.graph.sites import LeftAlone, Site, find_sites, sharing_groups
from quantkit.graph.tensors import detached

__all__ = [
    "Graph",
    "LeftAlone",
    "ModelLike",
    "Site",
    "detached",
    "find_sites",
    "load_graph",
    "sharing_groups",
]
