"""Secure aggregation: the server learns the sum of the updates and no update (docs/PROTOCOL.md); imported only then.

Arithmetic and cryptography only: nothing here knows files, workspaces or models.
"""
