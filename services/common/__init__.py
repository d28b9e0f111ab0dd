"""Code that all services share: the broker, settings, metrics, and the start and end of a process."""
