"""The declaration of an experiment: its parts, its validation, and the fingerprint that names what it computes."""
