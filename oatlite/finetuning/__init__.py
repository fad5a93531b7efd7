"""Training of a model that exists, by TRL: rows become tokens here, ranks train on them, and a folder comes out."""
