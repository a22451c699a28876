"""Features to neighbour lists, and neighbour lists to the affinity of the solver."""

from transclip_fast.graph.affinity import Affinity, affinity
from transclip_fast.graph.build import METHODS, build_graph
from transclip_fast.graph.exact import nearest
from transclip_fast.graph.lists import NeighborGraph

__all__ = ["METHODS", "Affinity", "NeighborGraph", "affinity", "build_graph", "nearest"]
