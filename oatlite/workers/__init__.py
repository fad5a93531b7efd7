"""The processes that a run is made of."""
