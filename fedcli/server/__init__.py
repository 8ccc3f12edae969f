"""The server's part: create a workspace, open rounds, merge updates, verify the history; no torch after round 0."""
