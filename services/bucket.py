"""`python -m services.bucket`: the name of `services.tools.make_bucket` in 0.1.0, kept for old deployments."""

import runpy

if __name__ == "__main__":
    runpy.run_module("services.tools.make_bucket", run_name="__main__", alter_sys=True)
