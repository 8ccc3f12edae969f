"""The workspace on disk: the only code that knows a path of it or opens a file in it (docs/PROTOCOL.md)."""
