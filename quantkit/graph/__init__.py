"""ONNX graphs: load and clean them, tell their fingerprint, find where they can be quantized."""

from quantkit.graph.load import Graph, ModelLike, load_graph
from quantkit.graph.sites import LeftAlone, Site, find_sites, sharing_groups

__all__ = ["Graph", "LeftAlone", "ModelLike", "Site", "find_sites", "load_graph", "sharing_groups"]
