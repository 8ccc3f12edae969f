"""Object stores and SFTP servers: objects by key, and a create-only write, which is the protocol's commit there."""
