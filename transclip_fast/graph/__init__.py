"""Features to neighbour lists, and neighbour lists to the affinity of the solver."""
