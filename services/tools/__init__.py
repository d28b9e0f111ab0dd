"""Commands for deployments: health check, creation of the bucket, generation of passwords."""
