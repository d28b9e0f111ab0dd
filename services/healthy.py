"""`python -m services.healthy`: the name of `services.tools.healthcheck` in 0.1.0, kept for old deployments."""

import runpy

if __name__ == "__main__":
    runpy.run_module("services.tools.healthcheck", run_name="__main__", alter_sys=True)
