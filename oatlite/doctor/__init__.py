"""``oatlite doctor``: what a run will meet on this machine, seen before it starts."""
