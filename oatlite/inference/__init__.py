"""The commands that only generate or score: ``generate``, ``chat``, ``eval`` and ``label``."""
