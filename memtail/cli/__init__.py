"""The command line: `app` holds the commands for experiments and scores, `service` those for the services, `study` the studies."""
