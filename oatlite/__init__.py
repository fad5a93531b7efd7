"""oatlite aligns language models online: an actor samples, an oracle compares, a learner updates."""

__version__ = "0.1.0"
