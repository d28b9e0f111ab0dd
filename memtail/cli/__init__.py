"""Command line: `app` has the commands for experiments and scores, `service` those for the services, `study` those for studies."""
