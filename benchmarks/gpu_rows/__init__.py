"""What ``benchmarks/gpu.py`` measures, a module for each kind of row. A row is a function of a Scale and a Tell."""
