"""Shared code of the services: broker, settings, metrics, process startup and shutdown."""
