"""Published scores: written from statistics (`files`), moved into the store as one version (`publish`), and read back (`reader`, `fetch`).

A version is a folder of files, listed in `names`. Readers follow the pointer `latest.json` (`pointer`), which moves only after all files of
its version are in the store. Reading imports neither torch nor, until influences are asked for, numba.
"""
