"""The method: assignments, means and variance in turn, each in closed form."""
