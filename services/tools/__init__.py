"""Commands that deployments run beside the services: health checks, a bucket, passwords."""
