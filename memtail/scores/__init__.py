"""The published files: written from statistics (`files`), moved into the store as one version (`publish`), and read back (`reader`).

A version is a folder of files (`names` lists them). Readers follow the pointer `latest.json` (`pointer`), which moves only after
everything it names is in the store. Reading needs neither torch nor numba until influences are asked for.
"""
