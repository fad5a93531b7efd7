"""Configuration: :mod:`schema` says what there is, :mod:`load` merges preset, file and flags into one ``Config``."""
